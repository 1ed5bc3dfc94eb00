// Torch's side: every schema, and the way from a stable Tensor to a TensorView. Decides nothing.
//
// Only PyTorch's stable ABI is used, so that one build serves every release from 2.11 on, and no
// symbol of libtorch_cuda is named, so that a CPU-only PyTorch loads the library too.
#include <dlfcn.h>
#include <torch/csrc/inductor/aoti_torch/c/shim.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <stdexcept>
#include <string>
#include <tuple>

#include "../core/operands.h"

namespace merge_attn_states {
namespace {

using torch::stable::Tensor;

constexpr uint32_t kUnknown = MERGE_ATTN_STATES_DTYPE(3, 0);

// PyTorch's number of a dtype, which may change between releases, as DLPack's.
uint32_t dlpack_dtype(int32_t scalar_type) {
  static const auto table = [] {
    std::array<uint32_t, 64> codes;
    codes.fill(kUnknown);
    const auto add = [&](int32_t type, int code, int bits) {
      if (type >= 0 && type < 64) codes[type] = MERGE_ATTN_STATES_DTYPE(code, bits);
    };
    add(aoti_torch_dtype_int8(), 0, 8);
    add(aoti_torch_dtype_int16(), 0, 16);
    add(aoti_torch_dtype_int32(), 0, 32);
    add(aoti_torch_dtype_int64(), 0, 64);
    add(aoti_torch_dtype_uint8(), 1, 8);
    add(aoti_torch_dtype_uint16(), 1, 16);
    add(aoti_torch_dtype_uint32(), 1, 32);
    add(aoti_torch_dtype_uint64(), 1, 64);
    add(aoti_torch_dtype_float16(), 2, 16);
    add(aoti_torch_dtype_float32(), 2, 32);
    add(aoti_torch_dtype_float64(), 2, 64);
    add(aoti_torch_dtype_bfloat16(), 4, 16);
    add(aoti_torch_dtype_complex32(), 5, 32);
    add(aoti_torch_dtype_complex64(), 5, 64);
    add(aoti_torch_dtype_complex128(), 5, 128);
    add(aoti_torch_dtype_bool(), 6, 8);
    add(aoti_torch_dtype_float8_e4m3fn(), 10, 8);
    add(aoti_torch_dtype_float8_e4m3fnuz(), 11, 8);
    add(aoti_torch_dtype_float8_e5m2(), 12, 8);
    add(aoti_torch_dtype_float8_e5m2fnuz(), 13, 8);
    add(torch_dtype_float8_e8m0fnu(), 14, 8);
    return codes;
  }();
  return scalar_type >= 0 && scalar_type < 64 ? table[scalar_type] : kUnknown;
}

// DLPack's numbers for CPU and CUDA; any other device keeps PyTorch's, out of their way.
int32_t dlpack_device(int32_t device_type) {
  if (device_type == aoti_torch_device_type_cpu()) return MERGE_ATTN_STATES_CPU;
  if (device_type == aoti_torch_device_type_cuda()) return MERGE_ATTN_STATES_CUDA;
  return 1000 + device_type;
}

void expect_success(AOTITorchError error) {
  if (error != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("merge_attn_states: PyTorch could not describe an operand");
  }
}

// A view and whether there is one: None and an undefined tensor are not given.
class Operand {
 public:
  explicit Operand(const Tensor& tensor) : given_(tensor.defined()) {
    if (given_) describe(tensor.get());
  }
  explicit Operand(const std::optional<Tensor>& tensor)
      : given_(tensor.has_value() && tensor->defined()) {
    if (given_) describe(tensor->get());
  }

  const TensorView* get() const { return given_ ? &view_ : nullptr; }

 private:
  void describe(AtenTensorHandle tensor) {
    int64_t rank, offset, memory_bytes, *sizes, *strides;
    int32_t dtype, device_type;
    expect_success(aoti_torch_get_dim(tensor, &rank));
    expect_success(aoti_torch_get_sizes(tensor, &sizes));
    expect_success(aoti_torch_get_strides(tensor, &strides));
    expect_success(aoti_torch_get_dtype(tensor, &dtype));
    expect_success(aoti_torch_get_device_type(tensor, &device_type));
    expect_success(aoti_torch_get_device_index(tensor, &view_.device_index));
    expect_success(aoti_torch_get_data_ptr(tensor, &view_.data));
    expect_success(aoti_torch_get_storage_offset(tensor, &offset));
    expect_success(aoti_torch_get_storage_size(tensor, &memory_bytes));
    view_.sizes = sizes;
    view_.strides = strides;
    view_.rank = static_cast<int32_t>(rank);
    view_.dtype = dlpack_dtype(dtype);
    view_.device_type = dlpack_device(device_type);
    set_memory(view_, offset * static_cast<int64_t>(aoti_torch_dtype_element_size(dtype)),
               memory_bytes);
  }

  bool given_;
  TensorView view_{.struct_size = sizeof(TensorView)};
};

// The operands of one call, alive as long as the args that point at them.
struct Call {
  Operand output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse;
  std::optional<int64_t> prefill_tokens_with_context;
  Operand output_scale;

  merge_attn_states_args args(void* stream) const {
    return {.struct_size = sizeof(merge_attn_states_args),
            .output = output.get(),
            .prefix_output = prefix_output.get(),
            .prefix_lse = prefix_lse.get(),
            .suffix_output = suffix_output.get(),
            .suffix_lse = suffix_lse.get(),
            .output_lse = output_lse.get(),
            .output_scale = output_scale.get(),
            .stream = stream,
            .prefill_tokens_with_context = prefill_tokens_with_context.value_or(0),
            .has_prefill_tokens_with_context = prefill_tokens_with_context.has_value(),
            .dependent_launch = 0};
  }
};

constexpr size_t kMessageSize = 1024;

// A std::invalid_argument arrives in Python as a ValueError with just its text, a
// std::runtime_error as a RuntimeError.
void expect_ok(merge_attn_states_status status, const char* message) {
  if (status == MERGE_ATTN_STATES_OK) return;
  if (status == MERGE_ATTN_STATES_INVALID_ARGUMENT) throw std::invalid_argument(message);
  throw std::runtime_error(message);
}

void merge_call(const Call& call, void* stream) {
  const merge_attn_states_args args = call.args(stream);
  char message[kMessageSize];
  expect_ok(merge_attn_states_merge(&args, message, sizeof(message)), message);
}

// Needs no stream: nothing is launched.
merge_attn_states_selection select_call(const Call& call) {
  const merge_attn_states_args args = call.args(nullptr);
  merge_attn_states_selection selection{.struct_size = sizeof(selection)};
  char message[kMessageSize];
  expect_ok(merge_attn_states_select(&args, &selection, message, sizeof(message)), message);
  return selection;
}

// PyTorch's current stream of a device, from a libtorch_cuda that is already loaded if there is
// one.
void* current_stream(const TensorView* output) {
  if (output == nullptr || output->device_type != MERGE_ATTN_STATES_CUDA) return nullptr;
  using GetStream = AOTITorchError (*)(int32_t, void**);
  static const auto get_stream = []() -> GetStream {
    void* library = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    if (library == nullptr) return nullptr;
    return reinterpret_cast<GetStream>(dlsym(library, "aoti_torch_get_current_cuda_stream"));
  }();
  if (get_stream == nullptr) {
    throw std::runtime_error(
        "merge_attn_states: this PyTorch has no CUDA streams (libtorch_cuda.so is not loaded); a "
        "CUDA build of PyTorch 2.11 or newer is needed, a ROCm build is not supported");
  }
  void* stream = nullptr;
  expect_success(get_stream(output->device_index, &stream));
  return stream;
}

// The operands in the schema's order, count included.
Call describe(const Tensor& output, const Tensor& prefix_output, const Tensor& prefix_lse,
              const Tensor& suffix_output, const Tensor& suffix_lse,
              const std::optional<Tensor>& output_lse, const std::optional<int64_t>& count,
              const std::optional<Tensor>& output_scale) {
  return {.output = Operand(output),
          .prefix_output = Operand(prefix_output),
          .prefix_lse = Operand(prefix_lse),
          .suffix_output = Operand(suffix_output),
          .suffix_lse = Operand(suffix_lse),
          .output_lse = Operand(output_lse),
          .prefill_tokens_with_context = count,
          .output_scale = Operand(output_scale)};
}

template <class... Operands>
void merge(Operands... operands) {
  const Call call = describe(operands...);
  merge_call(call, current_stream(call.output.get()));
}

template <class... Operands>
std::tuple<std::string, std::string> selected_kernel(Operands... operands) {
  const merge_attn_states_selection selection = select_call(describe(operands...));
  return {selection.kernel, selection.variant};
}

std::string build_info() { return merge_attn_states_build_info(); }

using T = const Tensor&;
using OptionalT = const std::optional<Tensor>&;
using OptionalInt = const std::optional<int64_t>&;

// One entry an op, the same for every device: the border is where devices part.
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("merge_attn_states",
               TORCH_BOX((&merge<T, T, T, T, T, OptionalT, OptionalInt, OptionalT>)));
  library.impl("selected_kernel",
               TORCH_BOX((&selected_kernel<T, T, T, T, T, OptionalT, OptionalInt, OptionalT>)));
}

}  // namespace
}  // namespace merge_attn_states

// SymInt?, because with int? torch.compile specialises on every count; a boxed kernel still gets an
// int64_t.
STABLE_TORCH_LIBRARY(merge_attn_states, m) {
  m.def(
      "merge_attn_states(Tensor(a!) output, Tensor prefix_output, Tensor prefix_lse, "
      "Tensor suffix_output, Tensor suffix_lse, Tensor(b!)? output_lse=None, "
      "SymInt? prefill_tokens_with_context=None, Tensor? output_scale=None) -> ()");
  m.def(
      "selected_kernel(Tensor output, Tensor prefix_output, Tensor prefix_lse, "
      "Tensor suffix_output, Tensor suffix_lse, Tensor? output_lse=None, "
      "SymInt? prefill_tokens_with_context=None, Tensor? output_scale=None) -> (str, str)");
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CPU, m) { merge_attn_states::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CUDA, m) { merge_attn_states::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CompositeImplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&merge_attn_states::build_info));
}
