#include "python_tensor.h"

#include <dlfcn.h>
#include <sys/auxv.h>
#include <unistd.h>

#include <algorithm>
#include <cstring>

#include "../core/dtypes.h"
#include "python_attribute.h"
#include "stable_tensor.h"

namespace merge_attn_states {
namespace {

// Another backend, or a dtype that no operand has: the dispatcher knows both by their names.
bool may_be_merged(const TensorView& view) {
  const bool is_operands =
      is_supported(static_cast<DType>(view.dtype)) || view.dtype == MERGE_ATTN_STATES_BOOL ||
      view.dtype == MERGE_ATTN_STATES_INT32 || view.dtype == MERGE_ATTN_STATES_INT64;
  return is_operands &&
         (view.device_type == MERGE_ATTN_STATES_CPU || view.device_type == MERGE_ATTN_STATES_CUDA);
}

// Without elements a tensor needs no memory.
bool has_what_it_needs(const TensorView& view) {
  return view.data != nullptr || std::count(view.sizes, view.sizes + view.rank, 0) > 0;
}

// DLPack gives the sum of a storage's address and an offset: where the storage has no memory, the
// offset alone, which has an address's look. Programs have nothing so low but themselves and the
// heap behind them, where an interpreter was linked to a fixed address.
bool may_be_an_offset(const void* data) {
  const auto address = reinterpret_cast<uintptr_t>(data);
  if (data == nullptr || address >= uint64_t{1} << 32) return false;
  return address < getauxval(AT_PHDR) || data >= sbrk(0);
}

// A view that PyTorch reads with the other sign is every second float of complex memory, so that
// none of its strides is 1; asking every tensor would cost as much as all else.
bool may_be_negative(const TensorView& view) {
  for (int i = view.rank - 1; i >= 0; --i) {  // in most tensors the last one's is 1
    if (view.sizes[i] > 1 && view.strides[i] == 1) return false;
  }
  return true;
}

bool is_true(PyObject* answer) {
  const bool result = answer != Py_False;  // an error counts as yes
  if (answer == nullptr) PyErr_Clear();
  Py_XDECREF(answer);
  return result;
}

}  // namespace

std::string PythonTensors::find() {
  PyObject* const tensor = attribute("torch", "Tensor");
  if (tensor == nullptr) return "torch.Tensor";
  type_ = reinterpret_cast<PyTypeObject*>(tensor);
  is_neg_ = attribute("torch", "is_neg");
  if (is_neg_ == nullptr) return "torch.is_neg";
  increment_version_ = attribute("torch._C", "_increment_version");
  if (increment_version_ == nullptr) return "torch._C._increment_version";
  requires_grad_name_ = PyUnicode_InternFromString("requires_grad");

  void* const libtorch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  if (libtorch != nullptr) {
    handle_of_ =
        reinterpret_cast<decltype(handle_of_)>(dlsym(libtorch, "torch_tensor_from_pyobject"));
  }
  if (handle_of_ != nullptr) return "";
  PyObject* const capsule = PyObject_GetAttrString(tensor, "__dlpack_c_exchange_api__");
  const auto* const api = static_cast<const DLPackExchangeAPI*>(
      capsule != nullptr ? PyCapsule_GetPointer(capsule, "dlpack_exchange_api") : nullptr);
  PyErr_Clear();
  if (api == nullptr) return "torch.Tensor.__dlpack_c_exchange_api__";
  if (api->header.version.major != DLPACK_MAJOR_VERSION ||
      api->dltensor_from_py_object_no_sync == nullptr) {
    return "version " + std::to_string(DLPACK_MAJOR_VERSION) + " of the DLPack C exchange API";
  }
  dlpack_of_ = api->dltensor_from_py_object_no_sync;
  return "";
}

bool PythonTensors::describe(PyObject* object, bool written, bool grad_mode, TensorView& view,
                             HeldTensor& held) const {
  if (Py_TYPE(object) != type_) return false;
  if (grad_mode && is_true(PyObject_GetAttr(object, requires_grad_name_))) return false;
  const bool described = handle_of_ != nullptr ? describe_by_handle(object, written, view, held)
                                               : describe_by_dlpack(object, view);
  return described && may_be_merged(view) && has_what_it_needs(view) &&
         !(may_be_negative(view) && is_true(PyObject_CallOneArg(is_neg_, object)));
}

bool PythonTensors::describe_by_handle(PyObject* object, bool written, TensorView& view,
                                       HeldTensor& held) const {
  void* handle = nullptr;
  if (handle_of_(object, &handle) != 0) return false;
  held.reset(static_cast<AtenTensorHandle>(handle));
  return merge_attn_states::describe(held.get(), written, view);
}

bool PythonTensors::describe_by_dlpack(PyObject* object, TensorView& view) const {
  DLTensor tensor;
  if (dlpack_of_(object, &tensor) != 0) {
    PyErr_Clear();  // a layout or a dtype that DLPack has no words for
    return false;
  }
  if (may_be_an_offset(tensor.data)) return false;
  static_assert(sizeof(tensor.dtype) == sizeof(view.dtype));
  view = {.struct_size = sizeof(view),
          .data = tensor.data,
          .sizes = tensor.shape,
          .strides = tensor.strides,
          .rank = tensor.ndim,
          .device_type = tensor.device.device_type,
          .device_index = tensor.device.device_id};
  std::memcpy(&view.dtype, &tensor.dtype, sizeof(view.dtype));
  return true;
}

bool PythonTensors::raise_versions(PyObject* const* written, Py_ssize_t count) const {
  PyObject* const tensors = PyTuple_New(count);
  if (tensors == nullptr) return false;
  for (Py_ssize_t i = 0; i < count; ++i) PyTuple_SET_ITEM(tensors, i, Py_NewRef(written[i]));
  PyObject* const done = PyObject_CallOneArg(increment_version_, tensors);
  Py_DECREF(tensors);
  Py_XDECREF(done);
  return done != nullptr;
}

}  // namespace merge_attn_states
