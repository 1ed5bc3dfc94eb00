// Python's side: a plain torch.Tensor by way of the DLPack C exchange API to a TensorView, and on
// to the op library's C entry. No Torch header but DLPack's; decides nothing.
#include <ATen/dlpack.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstring>
#include <optional>
#include <stdexcept>

#include "translate.h"

namespace py = pybind11;

namespace {

using merge_attn_states::Call;
using merge_attn_states::merge_call;
using merge_attn_states::select_call;

// PyTorch's table of functions; null where this PyTorch has none.
const DLPackExchangeAPI* exchange_api() {
  static const DLPackExchangeAPI* const api = []() -> const DLPackExchangeAPI* {
    const py::object tensor = py::module_::import("torch").attr("Tensor");
    if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) return nullptr;
    const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
    const void* table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
    if (table == nullptr) throw py::error_already_set();
    const auto* found = static_cast<const DLPackExchangeAPI*>(table);
    return found->header.version.major == DLPACK_MAJOR_VERSION ? found : nullptr;
  }();
  return api;
}

const DLPackExchangeAPI& needed_exchange_api() {
  if (exchange_api() == nullptr) {
    throw std::runtime_error("this PyTorch offers no DLPack C exchange API");
  }
  return *exchange_api();
}

// One operand, borrowed from Python for the call.
class Operand {
 public:
  explicit Operand(py::handle tensor) : given_(!tensor.is_none()) {
    if (!given_) return;
    DLTensor described;
    if (needed_exchange_api().dltensor_from_py_object_no_sync(tensor.ptr(), &described) != 0) {
      throw py::error_already_set();
    }
    static_assert(sizeof(described.dtype) == sizeof(view_.dtype));
    std::memcpy(&view_.dtype, &described.dtype, sizeof(view_.dtype));
    view_.data = static_cast<char*>(described.data) + described.byte_offset;
    view_.sizes = described.shape;
    view_.strides = described.strides;
    view_.rank = described.ndim;
    view_.device_type = described.device.device_type;
    view_.device_index = described.device.device_id;
  }

  const merge_attn_states_tensor* get() const { return given_ ? &view_ : nullptr; }

 private:
  bool given_;
  merge_attn_states_tensor view_{};
};

Call<Operand> describe(py::handle output, py::handle prefix_output, py::handle prefix_lse,
                       py::handle suffix_output, py::handle suffix_lse, py::handle output_lse,
                       py::handle count, py::handle output_scale) {
  return {.output = Operand(output),
          .prefix_output = Operand(prefix_output),
          .prefix_lse = Operand(prefix_lse),
          .suffix_output = Operand(suffix_output),
          .suffix_lse = Operand(suffix_lse),
          .output_lse = Operand(output_lse),
          .prefill_tokens_with_context = count.cast<std::optional<int64_t>>(),
          .output_scale = Operand(output_scale)};
}

void* current_stream(const merge_attn_states_tensor* output) {
  if (output == nullptr || output->device_type != MERGE_ATTN_STATES_CUDA) return nullptr;
  void* stream = nullptr;
  if (needed_exchange_api().current_work_stream(kDLCUDA, output->device_index, &stream) != 0) {
    throw py::error_already_set();
  }
  return stream;
}

template <class... Operands>
void merge(Operands... operands) {
  const Call<Operand> call = describe(operands...);
  void* const stream = current_stream(call.output.get());
  const py::gil_scoped_release release;
  merge_call(call, stream);
}

template <class... Operands>
py::tuple selected_kernel(Operands... operands) {
  const merge_attn_states_selection selection = select_call(describe(operands...));
  return py::make_tuple(selection.kernel, selection.variant);
}

// The operands' names, once for both functions.
template <class F>
void define(py::module_& module, const char* name, F function) {
  module.def(name, function, py::arg("output"), py::arg("prefix_output"), py::arg("prefix_lse"),
             py::arg("suffix_output"), py::arg("suffix_lse"), py::arg("output_lse") = py::none(),
             py::arg("prefill_tokens_with_context") = py::none(),
             py::arg("output_scale") = py::none());
}

}  // namespace

PYBIND11_MODULE(_C, module) {
  using H = py::handle;
  define(module, "merge_attn_states", &merge<H, H, H, H, H, H, H, H>);
  define(module, "selected_kernel", &selected_kernel<H, H, H, H, H, H, H, H>);
  module.def("build_info", &merge_attn_states_build_info);
  module.def("has_exchange_api", [] { return exchange_api() != nullptr; });
}
