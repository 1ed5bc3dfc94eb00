// One function: rows over threads. The library takes PyTorch's pool (torch/parallel.cpp), the fuzz
// target and other programs without libtorch one thread (parallel_serial.cpp).
#pragma once

#include <cstdint>

namespace merge_attn_states::cpu {

// Calls body(context, begin, end) for pieces of [0, count) of at least `grain`, until all is done.
void parallel_for(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                  const void* context);

}  // namespace merge_attn_states::cpu
