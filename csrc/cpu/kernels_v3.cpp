// The CPU kernel for x86-64-v3 processors (Haswell, Zen and later).
//
// The instruction set is switched on after every shared header: an inline function of those that
// were compiled wider here could be the copy that the linker keeps for the baseline too. It is no
// more than what merge.cpp asks the processor for.
#include <algorithm>

#include "kernels.h"

#if MERGE_ATTN_STATES_HAS_V3
#include <immintrin.h>

#ifndef __clang__
#pragma GCC target("avx2,bmi,bmi2,f16c,fma")
#endif
#define MERGE_ATTN_STATES_V3

namespace merge_attn_states::cpu::v3 {
#include "kernels.inc"
#include "parts.inc"
#include "parts_backward.inc"
#include "parts_merge.inc"
}  // namespace merge_attn_states::cpu::v3
#endif
