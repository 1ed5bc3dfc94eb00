// In place on the suffix, a token without context has its row already. Where its LSE goes elsewhere
// this is all that is left to do for it: the other kernels then end with the context.
#include <algorithm>

#include "families.h"
#include "launch.h"

namespace merge_attn_states::cuda {
namespace {

constexpr int kThreads = 256;

struct FurtherLses {
  int64_t first_token;
  int64_t num_tokens;  // from there on
  int64_t count;       // num_tokens of each head
  Lses from;
  Lses to;
};

template <class Acc>
__global__ void __launch_bounds__(kThreads) copy_lses(const __grid_constant__ FurtherLses call) {
  wait_for_previous();
  const int64_t step = int64_t{gridDim.x} * kThreads;
  for (int64_t i = int64_t{blockIdx.x} * kThreads + threadIdx.x; i < call.count; i += step) {
    const int64_t head = i / call.num_tokens;
    const int64_t token = call.first_token + (i - head * call.num_tokens);
    *lse_of<Acc>(call.to, token, head) = *lse_of<Acc>(call.from, token, head);
  }
}

}  // namespace

void launch_further_lses(const MergeCall& call) {
  const int64_t first = call.rule.num_tokens_with_context;
  const int64_t num_tokens = call.geometry.num_tokens - first;
  const FurtherLses parameters{.first_token = first,
                               .num_tokens = num_tokens,
                               .count = num_tokens * call.geometry.num_heads,
                               .from = call.parts.suffix.lse,
                               .to = call.merged.lse};
  const Grid grid{.blocks = std::min((parameters.count - 1) / kThreads + 1, kMaxGridX),
                  .threads = kThreads};
  const bool wide = call.input_dtype == DType::kFloat64;
  launch(wide ? copy_lses<double> : copy_lses<float>, grid, call, parameters);
}

}  // namespace merge_attn_states::cuda
