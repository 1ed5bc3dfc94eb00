#include "stable_tensor.h"

#include <dlfcn.h>
#include <torch/csrc/stable/c/shim.h>

#include <array>
#include <stdexcept>

namespace merge_attn_states {
namespace {

constexpr uint32_t kUnknown = MERGE_ATTN_STATES_DTYPE(3, 0);

// DLPack's numbers for CPU and CUDA; any other device keeps PyTorch's, out of their way.
int32_t dlpack_device(int32_t device_type) {
  if (device_type == aoti_torch_device_type_cpu()) return MERGE_ATTN_STATES_CPU;
  if (device_type == aoti_torch_device_type_cuda()) return MERGE_ATTN_STATES_CUDA;
  return 1000 + device_type;
}

AOTITorchError get_data(AtenTensorHandle tensor, bool written, void** data) {
  if (written) return torch_get_mutable_data_ptr(tensor, data);
  const void* read_only = nullptr;
  const AOTITorchError error = torch_get_const_data_ptr(tensor, &read_only);
  *data = const_cast<void*>(read_only);  // a view has one pointer; the kernels only read an input
  return error;
}

}  // namespace

// The numbers may change between releases.
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

bool describe(AtenTensorHandle tensor, bool written, TensorView& view) {
  int64_t rank, offset, memory_bytes, *sizes, *strides;
  int32_t dtype, device_type;
  if (aoti_torch_get_dim(tensor, &rank) || aoti_torch_get_sizes(tensor, &sizes) ||
      aoti_torch_get_strides(tensor, &strides) || aoti_torch_get_dtype(tensor, &dtype) ||
      aoti_torch_get_device_type(tensor, &device_type) || get_data(tensor, written, &view.data) ||
      aoti_torch_get_storage_offset(tensor, &offset) ||
      aoti_torch_get_storage_size(tensor, &memory_bytes)) {
    return false;
  }
  view.struct_size = sizeof(view);
  view.sizes = sizes;
  view.strides = strides;
  view.rank = static_cast<int32_t>(rank);
  view.dtype = dlpack_dtype(dtype);
  view.device_type = dlpack_device(device_type);
  view.device_index = 0;  // there is one CPU
  if (view.device_type != MERGE_ATTN_STATES_CPU &&
      aoti_torch_get_device_index(tensor, &view.device_index)) {
    return false;
  }
  const int64_t element_bytes = (view.dtype >> 8 & 0xff) / 8;  // 0 of an unknown dtype
  set_memory(view, offset * element_bytes, memory_bytes);
  return true;
}

// From a libtorch_cuda that is already loaded if there is one, so that nothing of it is linked.
void* current_stream(const TensorView& tensor) {
  if (tensor.device_type != MERGE_ATTN_STATES_CUDA) return nullptr;
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
  if (get_stream(tensor.device_index, &stream) != AOTI_TORCH_SUCCESS) {
    throw std::runtime_error("merge_attn_states: PyTorch could not tell its current stream");
  }
  return stream;
}

}  // namespace merge_attn_states
