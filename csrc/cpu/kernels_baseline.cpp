// The CPU kernel for any processor of the target architecture.
#include <algorithm>

#include "kernels.h"

namespace merge_attn_states::cpu::baseline {
#include "kernels.inc"
#include "parts.inc"
#include "parts_backward.inc"
#include "parts_merge.inc"
}  // namespace merge_attn_states::cpu::baseline
