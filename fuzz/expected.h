// What an accepted call must leave behind, computed element by element from what the memory held
// before it. Slow, in long double, and without a line of csrc.
#pragma once

#include "call.h"

namespace merge_attn_states::fuzz {

void check_output(const Call& call);
void check_output_lse(const Call& call);

}  // namespace merge_attn_states::fuzz
