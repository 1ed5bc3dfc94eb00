// The eager path of a merge across ranks: an object's plain call.
#include <algorithm>
#include <initializer_list>

#include "../ranks_entry.h"
#include "eager_path.h"

namespace merge_attn_states {
namespace {

bool has_sizes(const TensorView& view, std::initializer_list<int64_t> sizes) {
  return view.rank == static_cast<int32_t>(sizes.size()) &&
         std::equal(sizes.begin(), sizes.end(), view.sizes);
}

// A call that RankMerge would find right, and Direct would not have to prepare.
bool is_plain(const RanksArguments& args) {
  const RanksObject& object = *args.object;
  const TensorView &output = *args.output, &lse = *args.lse;
  if (output.rank != 3 || output.sizes[0] > object.max_tokens) return false;
  const int64_t tokens = output.sizes[0];
  const auto is_here = [&](const TensorView& view) {
    return view.device_type == MERGE_ATTN_STATES_CUDA && view.device_index == object.device_index;
  };
  if (!has_sizes(output, {tokens, object.num_heads, object.head_size}) ||
      !has_sizes(lse, {tokens, object.num_heads}) || output.strides[2] != 1 ||
      lse.dtype != MERGE_ATTN_STATES_FLOAT32 || !is_here(output) || !is_here(lse)) {
    return false;
  }
  if (args.empty != nullptr) {
    return args.lengths == nullptr && args.starts == nullptr &&
           has_sizes(*args.empty, {tokens, object.num_heads}) &&
           args.empty->dtype == MERGE_ATTN_STATES_BOOL && is_here(*args.empty);
  }
  if (args.starts == nullptr) return args.lengths == nullptr;
  const TensorView& starts = *args.starts;
  const bool counts =
      starts.dtype == MERGE_ATTN_STATES_INT32 || starts.dtype == MERGE_ATTN_STATES_INT64;
  const auto is_list = [&](const TensorView& view, int64_t size) {
    return has_sizes(view, {size}) && (view.strides[0] == 1 || size <= 1) &&
           view.dtype == starts.dtype && is_here(view);
  };
  return args.lengths != nullptr && counts && starts.rank == 1 &&
         is_list(starts, starts.sizes[0]) && is_list(*args.lengths, starts.sizes[0] - 1);
}

}  // namespace

PyObject* merge_ranks_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  constexpr int kTensors = 7;
  if (count != 11) Py_RETURN_FALSE;
  const ThreadState state = eager_path.ask();
  if (state == ThreadState::kWatched) Py_RETURN_FALSE;
  Views<kTensors> views(state);
  RanksArguments args{};
  const TensorView** const tensors[] = {&args.out,   &args.out_lse, &args.output, &args.lse,
                                        &args.empty, &args.lengths, &args.starts};
  for (int i = 0; i < kTensors; ++i) {
    if (!views.describe(arguments[i], i < 2, *tensors[i])) Py_RETURN_FALSE;
  }
  if (args.out == nullptr || args.output == nullptr || args.lse == nullptr) Py_RETURN_FALSE;
  args.nan_is_empty = arguments[7] == Py_True;
  args.base_is_two = arguments[8] == Py_True;
  args.is_in_buffer = arguments[9] == Py_True;
  args.object = static_cast<const RanksObject*>(PyLong_AsVoidPtr(arguments[10]));
  if (args.object == nullptr && PyErr_Occurred()) return nullptr;
  if (args.object == nullptr || !is_plain(args)) Py_RETURN_FALSE;
  if (!EagerPath::find_stream(*args.out, args.stream)) Py_RETURN_FALSE;
  return eager_path.run(state, arguments, args.out_lse == nullptr ? 1 : 2,
                        [&](char* message, size_t size) {
                          return merge_attn_states_merge_ranks(&args, message, size);
                        });
}

}  // namespace merge_attn_states
