// The CUDA side's entry: device guard, choice of the kernel, launch.
#include <algorithm>
#include <array>
#include <atomic>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../devices.h"
#include "driver.h"
#include "families.h"
#include "launch.h"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

// The call's device is current while it is launched, the caller's afterwards: its context lies on
// top of the thread's stack meanwhile. On the way back cudaSetDevice would create a context where
// the caller's device has none, hundreds of megabytes on a GPU that nobody uses, and would replace
// one that the caller has made.
class DeviceGuard {
 public:
  explicit DeviceGuard(int device) : device_(device), previous_(device) {
    if (driver().current_device() == device) return;
    check(cudaGetDevice(&previous_), device);
    if (previous_ == device) return;
    pushed_ = driver().push_context(device);
    if (!pushed_) check(cudaSetDevice(device), device);
  }
  ~DeviceGuard() {
    if (pushed_) {
      driver().pop_context(device_);
    } else if (previous_ != device_) {
      cudaSetDevice(previous_);
    }
  }
  DeviceGuard(const DeviceGuard&) = delete;
  DeviceGuard& operator=(const DeviceGuard&) = delete;

 private:
  int device_;
  int previous_;
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

bool wants_dependent_launch(bool of_this_call) {
  static const bool of_all_calls = [] {
    const char* wish = std::getenv("MERGE_ATTN_STATES_PDL");
    return wish != nullptr && std::strcmp(wish, "1") == 0;
  }();
  return of_this_call || of_all_calls;
}

}  // namespace

void check(cudaError_t status, int device) {
  if (status == cudaSuccess) return;
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

void launch(const void* function, cudaKernel_t handle, const Grid& grid, const Target& target,
            const void* parameters) {
  const dim3 blocks(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.blocks_y));
  const dim3 threads(static_cast<unsigned>(grid.threads));
  void* arguments[] = {const_cast<void*>(parameters)};
  // What the driver refuses did not run.
  if (handle != nullptr && !target.dependent_launch &&
      driver().launch(handle, blocks, threads, arguments, target.stream)) {
    return;
  }
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = blocks;
  config.blockDim = threads;
  config.stream = static_cast<cudaStream_t>(target.stream);
  config.attrs = &dependent;
  config.numAttrs = target.dependent_launch ? 1 : 0;
  check(cudaLaunchKernelExC(&config, function, arguments), target.device_index);
}

Selection choose(const MergeCall& call) {
  if (call.nothing_to_do()) return selection("generic", "nothing to do");
  const DeviceGuard guard(call.device_index);
  char variant[sizeof(Selection::variant)];
  if (const auto shape = pair_shape(call, device_of(call.device_index).capability)) {
    std::snprintf(variant, sizeof(variant), "%d %s in a block of %d threads, by %s", shape->rows,
                  shape->tokens_inside ? "tokens" : "heads",
                  shape->value_threads + shape->lse_threads,
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
  MergeCall call = given;
  call.dependent_launch =
      device.has_dependent_launch && wants_dependent_launch(given.dependent_launch);
  if (const auto shape = pair_shape(call, device.capability)) {
    launch_pair(call, *shape);
  } else {
    launch_generic(call, generic_shape(call));
  }
}

Selection choose(const PartsCall& call) {
  if (call.nothing_to_do()) return selection("generic", "nothing to do");
  if (const auto pair = as_pair(call)) return choose(*pair);
  char variant[sizeof(Selection::variant)];
  if (const auto shape = alike_shape(call)) {
    std::snprintf(variant, sizeof(variant), "%d parts, %d rows in a block of %d threads",
                  call.num_parts, shape->rows, shape->threads + shape->lse_threads);
    return selection("vectorized", variant);
  }
  if (const auto shape = each_shape(call)) {
    std::snprintf(variant, sizeof(variant),
                  "%d parts, each apart, %d rows in a block of %d threads", call.num_parts,
                  shape->rows, kEachThreads);
    return selection("vectorized", variant);
  }
  const AnyShape shape = any_shape(call);
  std::snprintf(variant, sizeof(variant), "%d parts, %d rows a block, %d elements at a time",
                call.num_parts, shape.rows, shape.elements);
  return selection(shape.elements > 1 ? "vectorized" : "generic", variant);
}

namespace {

PartsCall with_launch_attribute(const PartsCall& given) {
  PartsCall call = given;
  call.dependent_launch = device_of(given.device_index).has_dependent_launch &&
                          wants_dependent_launch(given.dependent_launch);
  return call;
}

}  // namespace

void run_backward(const PartsCall& given) {
  const DeviceGuard guard(given.device_index);
  const PartsCall call = with_launch_attribute(given);
  if (const auto shape = each_backward_shape(call)) {
    launch_each_backward(call, *shape);
  } else {
    launch_backward(call, backward_shape(call));
  }
}

void run(const PartsCall& given) {
  if (const auto pair = as_pair(given)) return run(*pair);
  const DeviceGuard guard(given.device_index);
  const PartsCall call = with_launch_attribute(given);
  if (const auto shape = alike_shape(call)) {
    (call.num_parts <= kFewParts ? launch_few : launch_many)(call, *shape);
  } else if (const auto shape = each_shape(call)) {
    launch_each(call, *shape);
  } else {
    launch_any(call, any_shape(call));
  }
}

PeerLayout peer_layout(int64_t ranks, int64_t max_rows, int64_t row_bytes) {
  return PeerLayout(kPeerSizes, ranks, max_rows, row_bytes);
}

void run(const RanksCall& call) {
  const DeviceGuard guard(call.device_index);
  launch_peers(call);
}

}  // namespace merge_attn_states::cuda
