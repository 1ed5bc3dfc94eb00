// Python's side: the eager fast path, a plain torch.Tensor to a TensorView and on to the op
// library's C entry. No Torch header but DLPack's; decides nothing but which way a call takes.
#include <pybind11/pybind11.h>

#include <algorithm>
#include <array>
#include <cstring>

#include "../core/tensor_view.h"
#include "running_torch.h"

namespace py = pybind11;

namespace {

using merge_attn_states::RunningTorch;
using merge_attn_states::set_memory;
using merge_attn_states::TensorHandle;
using merge_attn_states::TensorView;

RunningTorch running_torch;

// The schema's order.
enum Argument {
  kOutput,
  kPrefixOutput,
  kPrefixLse,
  kSuffixOutput,
  kSuffixLse,
  kOutputLse,
  kCount,
  kOutputScale,
  kArguments
};
constexpr Argument kFirstOptional = kOutputLse;

using Arguments = std::array<PyObject*, kArguments>;

Arguments argument_names() {
  return {PyUnicode_InternFromString("output"),
          PyUnicode_InternFromString("prefix_output"),
          PyUnicode_InternFromString("prefix_lse"),
          PyUnicode_InternFromString("suffix_output"),
          PyUnicode_InternFromString("suffix_lse"),
          PyUnicode_InternFromString("output_lse"),
          PyUnicode_InternFromString("prefill_tokens_with_context"),
          PyUnicode_InternFromString("output_scale")};
}

// False for what the signature does not take.
bool bind(PyObject* const* given, Py_ssize_t positional, PyObject* keywords, Arguments& bound) {
  if (positional > kArguments) return false;
  bound.fill(nullptr);
  std::copy(given, given + positional, bound.begin());
  const Py_ssize_t named = keywords != nullptr ? PyTuple_GET_SIZE(keywords) : 0;
  if (named > 0) {
    static const Arguments names = argument_names();
    for (Py_ssize_t k = 0; k < named; ++k) {
      // Names in a program's text are interned: equal ones are one object.
      const auto at = std::find(names.begin(), names.end(), PyTuple_GET_ITEM(keywords, k));
      if (at == names.end()) return false;
      PyObject*& argument = bound[at - names.begin()];
      if (argument != nullptr) return false;
      argument = given[positional + k];
    }
  }
  for (int i = kFirstOptional; i < kArguments; ++i) {
    if (bound[i] == nullptr) bound[i] = Py_None;
  }
  return std::find(bound.begin(), bound.end(), nullptr) == bound.end();
}

// False where torch.ops has to answer: what is more than memory with strides, or less.
bool describe(PyObject* object, bool grad_mode, TensorView& view) {
  if (!running_torch.is_plain_tensor(object)) return false;
  const TensorHandle tensor = running_torch.handle(object);
  if (running_torch.is_neg(tensor) || (grad_mode && running_torch.requires_grad(tensor))) {
    return false;
  }
  DLTensor described;
  if (!running_torch.describe(object, &described)) return false;
  // Another backend, or a dtype that is not merged: PyTorch has more of them than DLPack has names.
  constexpr uint32_t kMerged =
      1u << kDLFloat | 1u << kDLBfloat | 1u << kDLFloat8_e4m3fn | 1u << kDLFloat8_e5m2;
  if (described.device.device_type > kDLCUDA || described.dtype.code > kDLFloat8_e5m2 ||
      (kMerged >> described.dtype.code & 1) == 0) {
    return false;
  }
  static_assert(sizeof(described.dtype) == sizeof(view.dtype));
  std::memcpy(&view.dtype, &described.dtype, sizeof(view.dtype));
  view.struct_size = sizeof(view);
  view.data = described.data;
  view.sizes = described.shape;
  view.strides = described.strides;
  view.rank = described.ndim;
  view.device_type = described.device.device_type;
  view.device_index = described.device.device_id;
  int64_t offset, memory_bytes;
  if (!running_torch.storage_size(tensor, &memory_bytes) ||
      !running_torch.storage_offset(tensor, &offset)) {
    return false;
  }
  if (set_memory(view, offset * (described.dtype.bits / 8), memory_bytes)) return true;
  return std::count(described.shape, described.shape + described.ndim, 0) > 0;
}

// An op registered from C++ does not tell autograd of its write, and neither does this call: a
// tensor saved for backward and then overwritten would give a silently wrong gradient.
void raise_version(PyObject* written) {
  try {
    running_torch.raise_version(running_torch.handle(written));
  } catch (...) {  // an inference tensor has no version
  }
}

// True where it merged; False where it stepped aside and nothing happened; or the op's error.
PyObject* merge_attn_states_fast(PyObject*, PyObject* const* given, Py_ssize_t positional,
                                 PyObject* keywords) {
  Arguments bound;
  if (!running_torch.ready() || running_torch.is_watched() ||
      !bind(given, positional, keywords, bound)) {
    Py_RETURN_FALSE;
  }
  std::array<TensorView, kArguments> views;
  merge_attn_states_args args{.struct_size = sizeof(args)};
  const std::array<const TensorView**, kArguments> targets = {
      &args.output,     &args.prefix_output, &args.prefix_lse, &args.suffix_output,
      &args.suffix_lse, &args.output_lse,    nullptr,          &args.output_scale};
  try {
    const bool grad_mode = running_torch.grad_mode();
    for (int i = 0; i < kArguments; ++i) {
      if (i == kCount || (bound[i] == Py_None && i >= kFirstOptional)) continue;
      if (!describe(bound[i], grad_mode, views[i])) Py_RETURN_FALSE;
      *targets[i] = &views[i];
    }
  } catch (...) {  // a layout that DLPack has no words for
    Py_RETURN_FALSE;
  }
  if (bound[kCount] != Py_None) {
    int overflow = 0;
    if (!PyLong_CheckExact(bound[kCount])) Py_RETURN_FALSE;
    args.has_prefill_tokens_with_context = 1;
    args.prefill_tokens_with_context = PyLong_AsLongLongAndOverflow(bound[kCount], &overflow);
    if (overflow != 0) Py_RETURN_FALSE;
  }
  if (args.output->device_type == MERGE_ATTN_STATES_CUDA &&
      running_torch.current_stream({kDLCUDA, args.output->device_index}, &args.stream) != 0) {
    PyErr_Clear();
    Py_RETURN_FALSE;
  }

  char message[1024];
  merge_attn_states_status status;
  // 0.07 us, but a launch waits where the stream's queue is full, and what it waits for may want
  // the lock: a host function of Python's in that stream.
  Py_BEGIN_ALLOW_THREADS;
  status = merge_attn_states_merge(&args, message, sizeof(message));
  Py_END_ALLOW_THREADS;
  if (status != MERGE_ATTN_STATES_OK) {
    const bool invalid = status == MERGE_ATTN_STATES_INVALID_ARGUMENT;
    PyErr_SetString(invalid ? PyExc_ValueError : PyExc_RuntimeError, message);
    return nullptr;
  }
  if (!running_torch.inference_mode()) {
    raise_version(bound[kOutput]);
    if (args.output_lse != nullptr) raise_version(bound[kOutputLse]);
  }
  Py_RETURN_TRUE;
}

// Not by pybind11, whose own dispatcher takes 0.2 us for eight arguments and 0.9 us by keyword.
PyMethodDef fast_calls[] = {
    {"merge_attn_states",
     reinterpret_cast<PyCFunction>(reinterpret_cast<void (*)()>(merge_attn_states_fast)),
     METH_FASTCALL | METH_KEYWORDS,
     "Merge if these are plain tensors in a plain state of PyTorch, and return whether it did."},
    {nullptr, nullptr, 0, nullptr},
};

}  // namespace

PYBIND11_MODULE(_C, module) {
  running_torch.find();
  if (PyModule_AddFunctions(module.ptr(), fast_calls) != 0) throw py::error_already_set();
  module.def("why_no_fast_path", [] { return running_torch.why_not(); });
  module.def("build_info", &merge_attn_states_build_info);
}
