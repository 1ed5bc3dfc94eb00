// The operators of a merge across ranks by their GPUs alone: from their arguments to the kernels.
// What is wrong with a call RankMerge says (distributed.py).
#include <torch/csrc/stable/library.h>

#include "../devices.h"
#include "../ranks_entry.h"
#include "outcome.h"
#include "states_arguments.h"

namespace merge_attn_states {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;

void merge_ranks(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  TensorArgument out{stack.take<Tensor>()}, out_lse{stack.take<OptionalTensor>()};
  TensorArgument output{stack.take<Tensor>()}, lse{stack.take<Tensor>()};
  TensorArgument empty{stack.take<OptionalTensor>()}, lengths{stack.take<OptionalTensor>()};
  TensorArgument starts{stack.take<OptionalTensor>()};
  const bool nan_is_empty = stack.take<bool>(), base_is_two = stack.take<bool>();
  const bool is_in_buffer = stack.take<bool>();
  TensorArgument object{stack.take<Tensor>()};
  out.describe("out", true);
  out_lse.describe("out_lse", true);
  output.describe("output", false);
  lse.describe("lse", false);
  empty.describe("empty", false);
  lengths.describe("empty[0]", false);
  starts.describe("empty[1]", false);
  object.describe("object", false);
  const RanksArguments args{.out = out.get(),
                            .output = output.get(),
                            .lse = lse.get(),
                            .out_lse = out_lse.get(),
                            .empty = empty.get(),
                            .lengths = lengths.get(),
                            .starts = starts.get(),
                            .nan_is_empty = nan_is_empty,
                            .base_is_two = base_is_two,
                            .is_in_buffer = is_in_buffer,
                            .object = static_cast<const RanksObject*>(object.view.data),
                            .stream = current_stream(output.view)};
  Message message;
  expect_ok(merge_attn_states_merge_ranks(&args, message.text, sizeof(message.text)), message);
}

// Bytes of each rank's memory, words of its numbers, the most rows of a call that go as lines, and
// the fewest that are read.
void ranks_layout(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const auto ranks = stack.take<int64_t>(), rows = stack.take<int64_t>();
  const PeerLayout layout = cuda::peer_layout(ranks, rows, stack.take<int64_t>());
  values[0] = from(layout.bytes());
  values[1] = from(layout.numbers());
  values[2] = from(layout.line_rows);
  values[3] = from(layout.least_read_rows());
}

}  // namespace
}  // namespace merge_attn_states

STABLE_TORCH_LIBRARY_FRAGMENT(merge_attn_states, m) {
  m.def(
      "merge_ranks(Tensor(a!) out, Tensor(b!)? out_lse, Tensor output, Tensor lse, Tensor? empty, "
      "Tensor? lengths, Tensor? starts, bool nan_is_empty, bool base_is_two, bool is_in_buffer, "
      "Tensor object) -> ()");
  m.def("ranks_layout(int ranks, int rows, int row_bytes) -> (int, int, int, int)");
}
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CUDA, m) {
  m.impl("merge_ranks", &merge_attn_states::merge_ranks);
}
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CompositeImplicitAutograd, m) {
  m.impl("ranks_layout", &merge_attn_states::ranks_layout);
}
