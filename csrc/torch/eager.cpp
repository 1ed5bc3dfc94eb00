// Python's side: the eager fast path, a call with plain tensors in a plain state of PyTorch, handed
// to the op library's C entry. Decides nothing but which way a call takes.
#include <pybind11/pybind11.h>

#include <array>
#include <cstdlib>
#include <stdexcept>
#include <string>
#include <string_view>

#include "arguments.h"
#include "python_tensor.h"
#include "stable_tensor.h"
#include "thread_state.h"

namespace py = pybind11;

namespace {

using namespace merge_attn_states;

std::string why_not;  // empty: there is a fast path
ThreadQuestions thread_questions;
PythonTensors python_tensors;

void find() {
  const char* const wanted = std::getenv("MERGE_ATTN_STATES_FAST_PATH");
  for (const std::string_view off : {"0", "off", "no", "false"}) {
    if (wanted == nullptr || wanted != off) continue;
    why_not = std::string("MERGE_ATTN_STATES_FAST_PATH=") + wanted;
    return;
  }
  std::string lacks = thread_questions.find();
  if (lacks.empty()) lacks = python_tensors.find();
  if (!lacks.empty()) why_not = "this PyTorch has no " + lacks;
}

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
    return python_tensors.describe(object, spec.written, state == ThreadState::kGrad,
                                   operands.views[i], operands.held[i]);
  };
  // Outputs first: see stable_tensor.h.
  return all_operands([&](auto i) { return !kOperands[i].written || describe(i); }) &&
         all_operands([&](auto i) { return kOperands[i].written || describe(i); }) &&
         bind_count(arguments[kCountPosition], args);
}

// False where this PyTorch has no CUDA streams; torch.ops says so.
bool find_stream(merge_attn_states_args& args) {
  try {
    args.stream = current_stream(*args.output);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

bool raise_versions(Arguments arguments, const merge_attn_states_args& args) {
  std::array<PyObject*, kNumOperands> written;
  Py_ssize_t count = 0;
  for (int i = 0; i < kNumOperands; ++i) {
    const bool given = args.*kOperands[i].field != nullptr;
    if (kOperands[i].written && given) written[count++] = arguments[position(i)];
  }
  return python_tensors.raise_versions(written.data(), count);
}

// Takes every argument of the schema. True where it merged; False where it stepped aside and
// nothing happened; or the op's error.
PyObject* merge_attn_states_fast(PyObject*, Arguments arguments, Py_ssize_t count) {
  if (!why_not.empty() || count != kNumArguments) Py_RETURN_FALSE;
  const ThreadState state = thread_questions.ask();
  if (state == ThreadState::kWatched) Py_RETURN_FALSE;
  Operands operands;
  merge_attn_states_args args{.struct_size = sizeof(args)};
  if (!fill(args, operands, arguments, state) || !find_stream(args)) Py_RETURN_FALSE;

  char message[1024];
  merge_attn_states_status status;
  // A launch waits where the stream's queue is full, and what it waits for may want the lock: a
  // host function of Python's in that stream.
  Py_BEGIN_ALLOW_THREADS;
  status = merge_attn_states_merge(&args, message, sizeof(message));
  Py_END_ALLOW_THREADS;
  if (status == MERGE_ATTN_STATES_OK) {
    // Under no_grad too: what was saved for backward before is overwritten all the same.
    if (state != ThreadState::kInference && !raise_versions(arguments, args)) return nullptr;
    Py_RETURN_TRUE;
  }
  if (status == MERGE_ATTN_STATES_UNAVAILABLE) Py_RETURN_FALSE;  // nothing was written
  PyErr_SetString(
      status == MERGE_ATTN_STATES_INVALID_ARGUMENT ? PyExc_ValueError : PyExc_RuntimeError,
      message);
  return nullptr;
}

// Not by pybind11, whose own dispatcher takes several times as long for eight arguments.
PyMethodDef fast_calls[] = {
    {"merge_attn_states",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(merge_attn_states_fast)),
     METH_FASTCALL,
     "Merge if these are plain tensors in a plain state of PyTorch, and return whether it did."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  find();
  if (PyModule_AddFunctions(module.ptr(), fast_calls) != 0) throw py::error_already_set();
  module.def("why_no_fast_path", [] { return why_not; });
  module.def("build_info", &merge_attn_states_build_info);
}
