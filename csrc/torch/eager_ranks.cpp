// The eager path of a merge across ranks, whose arguments RankMerge has checked.
#include "../ranks_entry.h"
#include "eager_path.h"

namespace merge_attn_states {

PyObject* merge_ranks_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 11) Py_RETURN_FALSE;
  const ThreadState state = eager_path.ask();
  if (state == ThreadState::kWatched) Py_RETURN_FALSE;
  Views<7> views(state);
  RanksArguments args{};
  const TensorView** const tensors[] = {&args.out,   &args.out_lse, &args.output, &args.lse,
                                        &args.empty, &args.lengths, &args.starts};
  constexpr int kNeeded = 4;
  for (int i = 0; i < 7; ++i) {
    const bool is_there = views.describe(arguments[i], i < 2, *tensors[i]);
    if (!is_there || (i < kNeeded && *tensors[i] == nullptr)) Py_RETURN_FALSE;
  }
  args.nan_is_empty = arguments[7] == Py_True;
  args.base_is_two = arguments[8] == Py_True;
  args.is_in_buffer = arguments[9] == Py_True;
  args.peers = static_cast<const int64_t*>(PyLong_AsVoidPtr(arguments[10]));
  if (args.peers == nullptr && PyErr_Occurred()) return nullptr;
  if (args.out->device_type != MERGE_ATTN_STATES_CUDA) Py_RETURN_FALSE;
  if (args.peers == nullptr || !EagerPath::find_stream(*args.out, args.stream)) Py_RETURN_FALSE;
  return eager_path.run(state, arguments, 2, [&](char* message, size_t size) {
    return merge_attn_states_merge_ranks(&args, message, size);
  });
}

}  // namespace merge_attn_states
