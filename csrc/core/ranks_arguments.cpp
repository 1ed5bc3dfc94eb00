#include "ranks_arguments.h"

#include <algorithm>

namespace merge_attn_states {
namespace {

PerRow per_row(const TensorView* view) {
  if (view == nullptr) return {};
  const auto stride = [&](int dim) { return view->sizes[dim] == 1 ? 0 : view->strides[dim]; };
  return {.data = view->data, .strides = {stride(0), stride(1), 0, 0}};
}

}  // namespace

RanksCall ranks_call(const RanksArguments& args) {
  const RanksObject& object = *args.object;
  RanksCall call{.num_tokens = args.output->sizes[0],
                 .merged_heads = args.out->sizes[1],
                 .head_size = args.output->sizes[2],
                 .dtype = static_cast<DType>(args.output->dtype),
                 .output = per_row(args.output),
                 .lse = per_row(args.lse),
                 .empty = per_row(args.empty),
                 .lengths = args.lengths != nullptr ? args.lengths->data : nullptr,
                 .starts = args.starts != nullptr ? args.starts->data : nullptr,
                 .num_requests = args.lengths != nullptr ? args.lengths->sizes[0] : 0,
                 .has_64_bit_requests =
                     args.starts != nullptr && args.starts->dtype == MERGE_ATTN_STATES_INT64,
                 .nan_is_empty = args.nan_is_empty,
                 .out = per_row(args.out),
                 .out_lse = per_row(args.out_lse),
                 .base = args.base_is_two ? Base::kTwo : Base::kE,
                 .rank = static_cast<int>(object.rank),
                 .ranks = static_cast<int>(object.ranks),
                 .scatters = object.scatters != 0,
                 .max_rows = object.max_tokens * object.merged_heads,
                 .limit_ns = object.limit_ns,
                 .multiprocessors = object.multiprocessors,
                 .memory = {},
                 .is_in_buffer = args.is_in_buffer,
                 .buffers = {},
                 .numbers = object.numbers,
                 .report = object.report,
                 .device_index = args.output->device_index,
                 .dependent_launch = false,
                 .stream = args.stream};
  std::copy_n(object.memory(), call.ranks, call.memory);
  std::copy_n(object.buffers(), call.ranks, call.buffers);
  return call;
}

}  // namespace merge_attn_states
