// Python's side: the eager fast path, a call with plain tensors in a plain state of PyTorch, handed
// to the op library's C entry. Decides nothing but which way a call takes.
#include <pybind11/pybind11.h>

#include <array>

#include "arguments.h"
#include "eager_path.h"

namespace py = pybind11;

namespace {

using namespace merge_attn_states;

using Arguments = PyObject* const*;  // in the schema's order

bool bind_count(PyObject* count, merge_attn_states_args& args) {
  if (count == Py_None) return true;
  if (!PyLong_CheckExact(count)) return false;
  int overflow = 0;
  args.has_prefill_tokens_with_context = 1;
  args.prefill_tokens_with_context = PyLong_AsLongLongAndOverflow(count, &overflow);
  return overflow == 0;
}

// What the C entry's arguments point at.
struct Operands {
  std::array<TensorView, kNumOperands> views;
  std::array<HeldTensor, kNumOperands> held;
};

// The arguments as the C entry has them; false where torch.ops has to answer.
bool fill(merge_attn_states_args& args, Operands& operands, Arguments arguments,
          ThreadState state) {
  const auto describe = [&](auto i) {
    constexpr const OperandSpec& spec = kOperands[i];
    PyObject* const object = arguments[position(i)];
    if (spec.optional && object == Py_None) return true;
    args.*spec.field = &operands.views[i];
    return eager_path.describe(object, spec.written, state, operands.views[i], operands.held[i]);
  };
  // Outputs first: see stable_tensor.h.
  return all_operands([&](auto i) { return !kOperands[i].written || describe(i); }) &&
         all_operands([&](auto i) { return kOperands[i].written || describe(i); }) &&
         bind_count(arguments[kCountPosition], args);
}

// Takes every argument of the schema. True where it merged; False where it stepped aside and
// nothing happened; or the op's error.
PyObject* merge_attn_states_fast(PyObject*, Arguments arguments, Py_ssize_t count) {
  if (count != kNumArguments) Py_RETURN_FALSE;
  const ThreadState state = eager_path.ask();
  if (state == ThreadState::kWatched) Py_RETURN_FALSE;
  Operands operands;
  merge_attn_states_args args{.struct_size = sizeof(args)};
  if (!fill(args, operands, arguments, state) ||
      !EagerPath::find_stream(*args.output, args.stream)) {
    Py_RETURN_FALSE;
  }
  std::array<PyObject*, kNumOperands> written;
  Py_ssize_t num_written = 0;
  for (int i = 0; i < kNumOperands; ++i) {
    const bool given = args.*kOperands[i].field != nullptr;
    if (kOperands[i].written && given) written[num_written++] = arguments[position(i)];
  }
  return eager_path.run(state, written.data(), num_written, [&](char* message, size_t size) {
    return merge_attn_states_merge(&args, message, size);
  });
}

template <class Function>
PyMethodDef fast_call(const char* name, Function* function) {
  constexpr const char* kDoc =
      "Merge if these are plain tensors in a plain state of PyTorch, and return whether it did.";
  return {name, reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(function)),
          METH_FASTCALL, kDoc};
}

// Not by pybind11, whose own dispatcher takes several times as long for eight arguments.
PyMethodDef fast_calls[] = {
    fast_call("merge_attn_states", merge_attn_states_fast),
    fast_call("merge_states", merge_states_fast),
    fast_call("update_state", update_state_fast),
    fast_call("merge_ranks", merge_ranks_fast),
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  eager_path.find();
  if (PyModule_AddFunctions(module.ptr(), fast_calls) != 0) throw py::error_already_set();
  module.def("why_no_fast_path", [] { return eager_path.why_not(); });
  module.def("build_info", &merge_attn_states_build_info);
}
