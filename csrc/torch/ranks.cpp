// The operators of a merge across ranks by their GPUs alone: from their arguments to the kernels.
// What is wrong with a call RankMerge says (distributed.py).
#include <torch/csrc/stable/library.h>

#include "../core/ranks_call.h"
#include "../devices.h"
#include "states_arguments.h"

namespace merge_attn_states {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;

PerRow per_row(const TensorView& view) {
  const auto stride = [&](int dim) { return view.sizes[dim] == 1 ? 0 : view.strides[dim]; };
  return {.data = view.data, .strides = {stride(0), stride(1), 0, 0}};
}

// `peers`, int64 on the CPU: rank, ranks, whether heads are scattered, max_rows, the limit in ns,
// the addresses of numbers and report, each rank's memory, and each rank's buffer.
void merge_ranks(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  TensorArgument out{stack.take<Tensor>()}, out_lse{stack.take<Tensor>()};
  TensorArgument output{stack.take<Tensor>()}, lse{stack.take<Tensor>()};
  TensorArgument empty{stack.take<OptionalTensor>()}, lengths{stack.take<OptionalTensor>()};
  TensorArgument starts{stack.take<OptionalTensor>()};
  const bool nan_is_empty = stack.take<bool>(), base_is_two = stack.take<bool>();
  const bool is_in_buffer = stack.take<bool>();
  TensorArgument peers{stack.take<Tensor>()};
  out.describe("out", true);
  out_lse.describe("out_lse", true);
  output.describe("output", false);
  lse.describe("lse", false);
  empty.describe("empty", false);
  lengths.describe("empty[0]", false);
  starts.describe("empty[1]", false);
  peers.describe("peers", false);
  const auto* const of = static_cast<const int64_t*>(peers.view.data);
  RanksCall call{.num_tokens = output.view.sizes[0],
                 .merged_heads = out.view.sizes[1],
                 .head_size = output.view.sizes[2],
                 .dtype = static_cast<DType>(output.view.dtype),
                 .output = per_row(output.view),
                 .lse = per_row(lse.view),
                 .empty = empty.get() ? per_row(empty.view) : PerRow{},
                 .lengths = lengths.get() ? lengths.view.data : nullptr,
                 .starts = starts.get() ? starts.view.data : nullptr,
                 .num_requests = lengths.get() ? lengths.view.sizes[0] : 0,
                 .has_64_bit_requests = starts.view.dtype == MERGE_ATTN_STATES_INT64,
                 .nan_is_empty = nan_is_empty,
                 .out = per_row(out.view),
                 .out_lse = per_row(out_lse.view),
                 .base = base_is_two ? Base::kTwo : Base::kE,
                 .rank = static_cast<int>(of[0]),
                 .ranks = static_cast<int>(of[1]),
                 .scatters = of[2] != 0,
                 .max_rows = of[3],
                 .limit_ns = of[4],
                 .memory = {},
                 .is_in_buffer = is_in_buffer,
                 .buffers = {},
                 .numbers = reinterpret_cast<uint32_t*>(of[5]),
                 .report = reinterpret_cast<int64_t*>(of[6]),
                 .device_index = output.view.device_index,
                 .dependent_launch = false,
                 .stream = current_stream(output.view)};
  for (int rank = 0; rank < call.ranks; ++rank) {
    call.memory[rank] = reinterpret_cast<char*>(of[7 + rank]);
    call.buffers[rank] = reinterpret_cast<char*>(of[7 + call.ranks + rank]);
  }
  if (call.num_tokens > 0) cuda::run(call);
}

// Bytes of each rank's memory, words of its numbers, and the most rows of a call that go as lines.
void ranks_layout(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const auto ranks = stack.take<int64_t>(), rows = stack.take<int64_t>();
  const PeerLayout layout = cuda::peer_layout(ranks, rows, stack.take<int64_t>());
  values[0] = from(layout.bytes());
  values[1] = from(layout.numbers());
  values[2] = from(layout.line_rows);
}

}  // namespace
}  // namespace merge_attn_states

STABLE_TORCH_LIBRARY_FRAGMENT(merge_attn_states, m) {
  m.def(
      "merge_ranks(Tensor(a!) out, Tensor(b!) out_lse, Tensor output, Tensor lse, Tensor? empty, "
      "Tensor? lengths, Tensor? starts, bool nan_is_empty, bool base_is_two, bool is_in_buffer, "
      "Tensor peers) -> ()");
  m.def("ranks_layout(int ranks, int rows, int row_bytes) -> (int, int, int)");
}
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CUDA, m) {
  m.impl("merge_ranks", &merge_attn_states::merge_ranks);
}
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CompositeImplicitAutograd, m) {
  m.impl("ranks_layout", &merge_attn_states::ranks_layout);
}
