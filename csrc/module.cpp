// Python's side: a plain torch.Tensor by way of the DLPack C exchange API to a TensorView, and on
// to the op library's C entry. No Torch header but DLPack's; decides nothing.
#include <ATen/dlpack.h>
#include <merge_attn_states.h>
#include <pybind11/pybind11.h>

#include <cstring>
#include <optional>
#include <stdexcept>

namespace py = pybind11;

namespace {

constexpr size_t kMessageSize = 1024;

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

struct Call {
  Operand output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, output_scale;
  std::optional<int64_t> prefill_tokens_with_context;

  merge_attn_states_args args() const {
    void* stream = nullptr;
    if (output.get() != nullptr && output.get()->device_type == MERGE_ATTN_STATES_CUDA &&
        needed_exchange_api().current_work_stream(kDLCUDA, output.get()->device_index, &stream)) {
      throw py::error_already_set();
    }
    return {.version = MERGE_ATTN_STATES_VERSION,
            .has_prefill_tokens_with_context = prefill_tokens_with_context.has_value(),
            .prefill_tokens_with_context = prefill_tokens_with_context.value_or(0),
            .output = output.get(),
            .prefix_output = prefix_output.get(),
            .prefix_lse = prefix_lse.get(),
            .suffix_output = suffix_output.get(),
            .suffix_lse = suffix_lse.get(),
            .output_lse = output_lse.get(),
            .output_scale = output_scale.get(),
            .stream = stream};
  }
};

// pybind11 turns std::invalid_argument into a ValueError with just its text, as the dispatcher
// does.
void expect_ok(merge_attn_states_status status, const char* message) {
  if (status == MERGE_ATTN_STATES_OK) return;
  if (status == MERGE_ATTN_STATES_INVALID_ARGUMENT) throw std::invalid_argument(message);
  throw std::runtime_error(message);
}

Call describe(py::handle output, py::handle prefix_output, py::handle prefix_lse,
              py::handle suffix_output, py::handle suffix_lse, py::handle output_lse,
              py::handle prefill_tokens_with_context, py::handle output_scale) {
  std::optional<int64_t> count;
  if (!prefill_tokens_with_context.is_none()) {
    count = py::cast<int64_t>(prefill_tokens_with_context);
  }
  return {
      Operand(output),     Operand(prefix_output), Operand(prefix_lse),   Operand(suffix_output),
      Operand(suffix_lse), Operand(output_lse),    Operand(output_scale), count};
}

template <class... Operands>
void merge(Operands... operands) {
  const Call call = describe(operands...);
  const merge_attn_states_args args = call.args();
  char message[kMessageSize];
  merge_attn_states_status status;
  {
    py::gil_scoped_release release;
    status = merge_attn_states_merge(&args, message, sizeof(message));
  }
  expect_ok(status, message);
}

template <class... Operands>
py::tuple selected_kernel(Operands... operands) {
  const Call call = describe(operands...);
  const merge_attn_states_args args = call.args();
  merge_attn_states_selection selection;
  char message[kMessageSize];
  expect_ok(merge_attn_states_select(&args, &selection, message, sizeof(message)), message);
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
