// From a torch.Tensor's Python object to a TensorView, without PyTorch's dispatcher: by its stable
// C functions where they take a Python object (2.14 and later), else by the DLPack C exchange API.
// May know nothing of how PyTorch lays out either object; what is more than memory with strides,
// or less, is left to the dispatcher.
#pragma once

#include <ATen/dlpack.h>
#include <Python.h>

#include <memory>
#include <string>
#include <type_traits>

#include "../core/tensor_view.h"
#include "stable_tensor.h"

namespace merge_attn_states {

struct DeleteTensor {
  void operator()(AtenTensorHandle tensor) const { aoti_torch_delete_tensor_object(tensor); }
};
using HeldTensor = std::unique_ptr<std::remove_pointer_t<AtenTensorHandle>, DeleteTensor>;

class PythonTensors {
 public:
  // Empty, or what this PyTorch lacks. Makes no tensor.
  std::string find();

  // False where torch.ops has to answer, and no Python error is left. The view borrows from the
  // object. From PyTorch 2.14 on its memory is bounded, an input is only read, and the tensor is
  // held: while the interpreter's lock is given back, another thread could swap it for a smaller
  // one (torch.utils.swap_tensors refuses what has another owner).
  bool describe(PyObject* object, bool written, bool grad_mode, TensorView& view,
                HeldTensor& held) const;

  // Tells autograd that these were written; inference tensors have no version and are passed by.
  // False with a Python error.
  bool raise_versions(PyObject* const* written, Py_ssize_t count) const;

 private:
  bool describe_by_handle(PyObject* object, bool written, TensorView& view, HeldTensor& held) const;
  bool describe_by_dlpack(PyObject* object, TensorView& view) const;

  PyTypeObject* type_ = nullptr;  // torch.Tensor: no subclass, and no torch.nn.Parameter
  PyObject* is_neg_ = nullptr;
  PyObject* increment_version_ = nullptr;
  PyObject* requires_grad_name_ = nullptr;
  int (*handle_of_)(void* object, void** handle) = nullptr;
  int (*dlpack_of_)(void* object, DLTensor* out) = nullptr;
};

}  // namespace merge_attn_states
