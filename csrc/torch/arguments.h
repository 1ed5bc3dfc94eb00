// Where each argument stands in the operator's schema: the operands in their table's order, and the
// context count before the last of them.
#pragma once

#include "../core/operands.h"

namespace merge_attn_states {

inline constexpr int kCountPosition = kOutputScale;
inline constexpr int kNumArguments = kNumOperands + 1;

constexpr int position(int operand) { return operand < kCountPosition ? operand : operand + 1; }

}  // namespace merge_attn_states
