// The CUDA side's entry: device guard, choice of the kernel, launch.
#include <dlfcn.h>

#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../kernels.h"
#include "families.h"
#include "launch.h"

namespace merge_attn_states::cuda {
namespace {

// A function of the driver that is already loaded; null where there is none.
template <class Function>
Function* driver_function(const char* name) {
  void* driver = dlopen("libcuda.so.1", RTLD_LAZY | RTLD_NOLOAD);
  return driver ? reinterpret_cast<Function*>(dlsym(driver, name)) : nullptr;
}

bool has_context(int device) {
  static const auto get_state =
      driver_function<int(int, unsigned*, int*)>("cuDevicePrimaryCtxGetState");
  unsigned flags = 0;
  int active = 1;
  return get_state == nullptr || get_state(device, &flags, &active) != 0 || active != 0;
}

// The call's device is current while it is launched, the caller's afterwards. Where the caller's
// has no context, cudaSetDevice would create one on the way back, hundreds of megabytes on a GPU
// that nobody uses: there the call's context lies on top of the thread's stack meanwhile.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device) {
    check(cudaGetDevice(&previous_), device);
    if (previous_ == device_) return;
    pushed_ = !has_context(previous_) && push();
    if (!pushed_) check(cudaSetDevice(device_), device_);
  }
  ~DeviceGuard() {
    if (previous_ == device_) return;
    if (!pushed_) {
      cudaSetDevice(previous_);
      return;
    }
    void* context = nullptr;
    driver_function<int(void**)>("cuCtxPopCurrent_v2")(&context);
    driver_function<int(int)>("cuDevicePrimaryCtxRelease_v2")(device_);
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  bool push() {
    const auto retain = driver_function<int(void**, int)>("cuDevicePrimaryCtxRetain");
    const auto push = driver_function<int(void*)>("cuCtxPushCurrent_v2");
    void* context = nullptr;
    if (retain == nullptr || push == nullptr || retain(&context, device_) != 0) return false;
    return push(context) == 0;
  }

  int device_;
  int previous_ = 0;
  bool pushed_ = false;
};

// Compiled for the same architectures as every kernel of this library, and never launched.
__global__ void code_of_this_device() {}

struct Device {
  int capability;             // major * 10 + minor
  bool has_dependent_launch;  // its code holds wait_for_previous's instruction
};

// Not the device alone decides: one of sm_90 may run PTX of an older architecture, which would be
// launched early and never wait.
Device ask_device(int device) {
  int major = 0, minor = 0;
  check(cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device), device);
  check(cudaDeviceGetAttribute(&minor, cudaDevAttrComputeCapabilityMinor, device), device);
  cudaFuncAttributes code{};
  check(cudaFuncGetAttributes(&code, code_of_this_device), device);
  return {.capability = 10 * major + minor,
          .has_dependent_launch = major >= 9 && code.ptxVersion >= 90};
}

// Asked once a device, which is current.
Device device_of(int index) {
  static std::array<std::atomic<int>, 64> known{};  // capability * 2 + has_dependent_launch
  const bool remembers = index >= 0 && index < static_cast<int>(known.size());
  if (const int code = remembers ? known[index].load(std::memory_order_relaxed) : 0) {
    return {.capability = code / 2, .has_dependent_launch = code % 2 == 1};
  }
  const Device device = ask_device(index);
  if (remembers) {
    known[index].store(2 * device.capability + device.has_dependent_launch,
                       std::memory_order_relaxed);
  }
  return device;
}

// In place on the suffix the kernels end with the context, and what lies behind it has a kernel of
// its own.
MergeCall for_kernels(const MergeCall& call) {
  return call.keeps_suffix_rows() ? call.up_to_context() : call;
}

bool wants_dependent_launch(const MergeCall& call) {
  static const bool of_all_calls = [] {
    const char* wish = std::getenv("MERGE_ATTN_STATES_PDL");
    return wish != nullptr && std::strcmp(wish, "1") == 0;
  }();
  return call.dependent_launch || of_all_calls;
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

Selection choose(const MergeCall& given) {
  const MergeCall call = for_kernels(given);
  if (call.nothing_to_do()) return selection("generic", "nothing to do");
  const DeviceGuard guard(call.device_index);
  char variant[sizeof(Selection::variant)];
  if (const auto shape = pair_shape(call, device_of(call.device_index).capability)) {
    std::snprintf(variant, sizeof(variant), "%d %s in a block of %d threads, by %s", shape->rows,
                  shape->tokens_inside ? "tokens" : "heads", shape->threads,
                  shape->weighs_by_tile ? "tiles" : "rows");
    return selection("vectorized", variant);
  }
  const GenericShape shape = generic_shape(call);
  std::snprintf(variant, sizeof(variant), "%d rows a block, %d elements at a time", shape.rows,
                shape.pack_elements);
  return selection("generic", variant);
}

void run(const MergeCall& given) {
  const DeviceGuard guard(given.device_index);
  const Device device = device_of(given.device_index);
  MergeCall whole = given;
  whole.dependent_launch = device.has_dependent_launch && wants_dependent_launch(given);
  const MergeCall call = for_kernels(whole);
  if (call.geometry.num_tokens < whole.geometry.num_tokens) launch_further_lses(whole);
  if (call.nothing_to_do()) return;
  if (const auto shape = pair_shape(call, device.capability)) {
    launch_pair(call, *shape);
  } else {
    launch_generic(call, generic_shape(call));
  }
}

}  // namespace merge_attn_states::cuda
