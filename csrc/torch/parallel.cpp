// Threads from PyTorch's pool, so that torch.set_num_threads holds here too.
#include "../cpu/parallel.h"

#include <torch/csrc/stable/ops.h>

namespace merge_attn_states::cpu {

void parallel_for(int64_t count, int64_t grain, void (*body)(const void*, int64_t, int64_t),
                  const void* context) {
  torch::stable::parallel_for(0, count, grain,
                              [=](int64_t begin, int64_t end) { body(context, begin, end); });
}

}  // namespace merge_attn_states::cpu
