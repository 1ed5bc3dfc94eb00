// The two builds of the CPU kernel.
#pragma once

#include "../merge_args.h"

#if defined(__x86_64__)
#define MERGE_ATTN_STATES_HAS_V3 1
#else
#define MERGE_ATTN_STATES_HAS_V3 0
#endif

namespace merge_attn_states::cpu {

namespace baseline {
void merge_rows(const MergeArgs& args, int64_t begin, int64_t end);
}  // namespace baseline

namespace v3 {  // x86-64-v3: AVX2 and F16C
void merge_rows(const MergeArgs& args, int64_t begin, int64_t end);
}  // namespace v3

}  // namespace merge_attn_states::cpu
