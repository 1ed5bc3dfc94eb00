// The CUDA side's entry: device guard, choice of the kernel, launch.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <optional>
#include <string>

#include "../kernels.h"
#include "launch.h"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

// Whether a device has a primary context, asked of the driver that is already loaded. To make a
// device current that has none would create one: hundreds of megabytes on a GPU that nobody uses.
bool has_context(int device) {
  using GetState = int (*)(int, unsigned*, int*);
  static const auto get_state = []() -> GetState {
    void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
    return driver ? reinterpret_cast<GetState>(dlsym(driver, "cuDevicePrimaryCtxGetState"))
                  : nullptr;
  }();
  unsigned flags = 0;
  int active = 1;
  return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
}

// The call's device is current while it is launched, the caller's afterwards.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), device);
    if (previous_ != device_) check(cudaSetDevice(device_), device);
  }
  ~DeviceGuard() {
    if (previous_ != device_ && has_context(previous_)) cudaSetDevice(previous_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_ = 0;
};

// Compiled for the same architectures as every kernel of this library, and never launched.
__global__ void code_of_this_device() {}

// Whether the code that runs on a device holds wait_for_previous's instructions: not the device
// decides, since one of sm_90 may run PTX of an older architecture, which would launch early and
// never wait. Asked once a device.
bool overlaps_previous(int device) {
  enum : int8_t { kUnknown, kNo, kYes };
  static std::array<std::atomic<int8_t>, 64> known{};
  const auto ask = [device] {
    int major = 0;
    check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), device);
    cudaFuncAttributes code{};
    check(cudaFuncGetAttributes(&code, code_of_this_device), device);
    return major >= 9 && code.ptxVersion >= 90 ? kYes : kNo;
  };
  if (device < 0 || device >= static_cast<int>(known.size())) return ask() == kYes;
  int8_t state = known[device].load(std::memory_order_relaxed);
  if (state == kUnknown) known[device].store(state = ask(), std::memory_order_relaxed);
  return state == kYes;
}

bool is_aligned(const Rows& rows, int64_t element_bytes, int64_t pack_bytes) {
  const auto multiple = [=](int64_t value) { return value % pack_bytes == 0; };
  return rows.element_stride == 1 && multiple(reinterpret_cast<intptr_t>(rows.data)) &&
         multiple(rows.token_stride * element_bytes) && multiple(rows.head_stride * element_bytes);
}

// Whole rows consist of aligned packs of `bytes` of input, and the output's of as many elements.
bool consists_of_packs(const MergeCall& call, int64_t bytes) {
  const int64_t input_bytes = size_of(call.input_dtype), output_bytes = size_of(call.output_dtype);
  const int64_t elements = bytes / input_bytes;
  return call.geometry.head_size > 0 && call.geometry.head_size % elements == 0 &&
         is_aligned(call.parts.prefix.output, input_bytes, bytes) &&
         is_aligned(call.parts.suffix.output, input_bytes, bytes) &&
         is_aligned(call.merged.output, output_bytes, elements * output_bytes);
}

// Null where the vectorized kernel cannot run.
std::optional<Tile> tile_for(const MergeCall& call) {
  const bool supported = call.input_dtype == DType::kFloat32 ||
                         call.input_dtype == DType::kFloat16 ||
                         call.input_dtype == DType::kBFloat16;
  if (!supported || !consists_of_packs(call, 16)) return std::nullopt;
  // It counts tokens, heads, packs and tiles in 32 bits; what is larger loops in the generic
  // kernel.
  if (std::max({call.geometry.num_tokens, call.geometry.num_heads, packs_per_row(call)}) >
      kMaxGridX / 2) {
    return std::nullopt;
  }
  const Tile tile = choose_tile(call, packs_per_row(call));
  const int64_t token_tiles = tile.token_tiles(call.geometry.num_tokens);
  if (tile.head_tiles(call.geometry.num_heads) > kMaxGridX / token_tiles) return std::nullopt;
  return tile;
}

GenericShape generic_shape(const MergeCall& call) {
  return choose_generic(call, consists_of_packs(call, kGenericPackBytes));
}

}  // namespace

void check(cudaError_t status, int device) {
  if (status == cudaSuccess) return;
  cudaGetLastError();  // a refused launch must not be found by the caller's next check
  const std::string what =
      std::string(cudaGetErrorName(status)) + ", " + cudaGetErrorString(status);
  if (status == cudaErrorNoKernelImageForDevice || status == cudaErrorInvalidDeviceFunction) {
    int major = 0, minor = 0;
    cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
    cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device);
    const std::string here = std::to_string(major) + "." + std::to_string(minor);
    throw Unavailable("cuda:" + std::to_string(device) + " has compute capability " + here +
                      ", and this build of merge_attn_states holds code for " +
                      MERGE_ATTN_STATES_BUILD_ARCHITECTURES +
                      "; reinstall it from source with TORCH_CUDA_ARCH_LIST=" + here);
  }
  // An old driver cannot compile newer PTX either, where a GPU needs that.
  const bool driver = status == cudaErrorInsufficientDriver || status == cudaErrorNoDevice ||
                      status == cudaErrorUnsupportedPtxVersion || status == cudaErrorInvalidPtx ||
                      status == cudaErrorJitCompilerNotFound;
  if (driver) {
    throw Unavailable(
        "the CUDA driver cannot run this build of merge_attn_states, made with CUDA " +
        std::string(MERGE_ATTN_STATES_BUILD_CUDA) + " (" + what +
        "); update the driver or reinstall from source with an older toolkit");
  }
  throw CudaError("cuda:" + std::to_string(device) + ": " + what);
}

Selection choose(const MergeCall& call) {
  char variant[sizeof(Selection::variant)];
  if (call.nothing_to_do()) return selection("generic", "nothing to do");
  if (const auto tile = tile_for(call)) {
    std::snprintf(variant, sizeof(variant), "%d tokens x %d heads, %d threads%s",
                  1 << tile->token_bits, 1 << tile->head_bits, tile->threads,
                  tile->packs_a_thread == 2 ? ", two packs" : "");
    return selection("vectorized", variant);
  }
  const GenericShape shape = generic_shape(call);
  std::snprintf(variant, sizeof(variant), "%d rows a block, %d elements at a time", shape.rows,
                shape.pack_elements);
  return selection("generic", variant);
}

void run(const MergeCall& call) {
  const DeviceGuard guard(call.device_index);
  const bool overlaps = overlaps_previous(call.device_index);
  if (const auto tile = tile_for(call)) {
    launch_vectorized(call, *tile, overlaps);
  } else {
    launch_generic(call, generic_shape(call), overlaps);
  }
}

}  // namespace merge_attn_states::cuda
