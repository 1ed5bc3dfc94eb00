// What the eager fast path asks of the PyTorch that is running.
//
// PyTorch has a stable C interface for a tensor, but no way to it from a Python object, and its
// questions about a thread cost 0.05 us and more each through Python. So a few functions are looked
// up by the names under which libc10 and libtorch_cpu export them, and the place of the tensor
// inside its Python object is found on sample tensors. All of it is then held against what PyTorch
// says through Python; where something is missing or does not agree, there is no fast path.
#pragma once

#include <ATen/dlpack.h>
#include <Python.h>
#include <dlfcn.h>

#include <cstdint>
#include <string>

namespace merge_attn_states {

// What PyTorch's C shims call an AtenTensorHandle.
using TensorHandle = void*;

class RunningTorch {
 public:
  // Never throws: without a proof, why_not() is a sentence.
  void find();
  bool ready() const { return why_not_.empty(); }
  const std::string& why_not() const { return why_not_; }

  // Whether anything stands between a call and its kernel that wants to see it. Dispatch and Python
  // modes, fake tensors, tracing, functionalization and functorch each put a key into the thread's
  // included set; function modes are counted apart.
  bool is_watched() const {
    return (included_keys() & ~inference_key_) != 0 || function_mode_enabled_();
  }
  bool inference_mode() const { return (included_keys() & inference_key_) != 0; }
  bool grad_mode() const { return grad_mode_enabled_(); }

  // No subclass, and no torch.nn.Parameter, which is one.
  bool is_plain_tensor(PyObject* object) const { return Py_TYPE(object) == tensor_type_; }

  // Of a plain tensor.
  TensorHandle handle(PyObject* tensor) const {
    return reinterpret_cast<char*>(tensor) + handle_offset_;
  }
  bool is_neg(TensorHandle tensor) const { return is_neg_(tensor); }
  bool requires_grad(TensorHandle tensor) const {
    return requires_grad_(*static_cast<void**>(tensor));
  }
  // Throws or returns false where DLPack has no words for the tensor. The functions behind the
  // exchange API, where they are exported: a pybind11 cast around them costs three times as much.
  bool describe(PyObject* object, DLTensor* described) const {
    if (to_dlpack_ != nullptr) {
      to_dlpack_(handle(object), described);
    } else if (to_dlpack_of_214_ != nullptr) {
      to_dlpack_of_214_(handle(object), described, /*read_only=*/false);
    } else if (exchange_->dltensor_from_py_object_no_sync(object, described) != 0) {
      PyErr_Clear();
      return false;
    }
    return true;
  }
  bool storage_size(TensorHandle tensor, int64_t* bytes) const {
    return storage_size_(tensor, bytes) == 0;
  }
  bool storage_offset(TensorHandle tensor, int64_t* elements) const {
    return storage_offset_(tensor, elements) == 0;
  }
  // Throws for an inference tensor, which has no version.
  void raise_version(TensorHandle tensor) const { raise_version_(tensor); }

  // 0, or -1 with a Python error.
  int current_stream(const DLDevice& device, void** stream) const {
    return exchange_->current_work_stream(device.device_type, device.device_id, stream);
  }

 private:
  static constexpr const char* kIncludedKeys = "_ZN3c104impl26raw_local_dispatch_key_setE";

  void look_up();
  void find_handle();
  void prove_tensors() const;
  void prove_thread();

  // A thread's own variable in libc10, stored so that it is 0 where nothing is going on.
  uint64_t included_keys() const {
    static thread_local const auto* const keys =
        static_cast<const uint64_t*>(dlsym(libc10_, kIncludedKeys));
    return *keys;
  }

  std::string why_not_ = "not looked for";
  PyTypeObject* tensor_type_ = nullptr;
  const DLPackExchangeAPI* exchange_ = nullptr;
  int64_t handle_offset_ = 0;  // bytes from a tensor's Python object to its handle
  uint64_t inference_key_ = 0;
  void* libc10_ = nullptr;
  bool (*function_mode_enabled_)() = nullptr;
  bool (*grad_mode_enabled_)() = nullptr;
  bool (*is_neg_)(TensorHandle) = nullptr;
  bool (*requires_grad_)(const void* tensor_impl) = nullptr;
  void (*to_dlpack_)(TensorHandle, DLTensor*) = nullptr;  // PyTorch 2.11 to 2.13
  void (*to_dlpack_of_214_)(TensorHandle, DLTensor*, bool) = nullptr;
  int32_t (*storage_size_)(TensorHandle, int64_t*) = nullptr;
  int32_t (*storage_offset_)(TensorHandle, int64_t*) = nullptr;
  void (*raise_version_)(TensorHandle) = nullptr;
};

}  // namespace merge_attn_states
