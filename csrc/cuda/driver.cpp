#include "driver.h"

#include <dlfcn.h>

namespace merge_attn_states::cuda {

Driver::Driver() {
  void* const library = dlopen("libcuda.so.1", RTLD_LAZY);
  if (library == nullptr) return;
  const auto find = [&]<class Function>(Function& function, const char* name) {
    function = reinterpret_cast<Function>(dlsym(library, name));
  };
  find(get_device_, "cuCtxGetDevice");
  find(launch_, "cuLaunchKernel");
  find(retain_, "cuDevicePrimaryCtxRetain");
  find(release_, "cuDevicePrimaryCtxRelease_v2");
  find(push_, "cuCtxPushCurrent_v2");
  find(pop_, "cuCtxPopCurrent_v2");
}

std::optional<int> Driver::current_device() const {
  CUdevice device;
  if (get_device_ == nullptr || get_device_(&device) != CUDA_SUCCESS) return std::nullopt;
  return device;
}

bool Driver::launch(CUkernel kernel, dim3 grid, dim3 block, void** parameters, void* stream) const {
  return launch_ != nullptr &&
         launch_(reinterpret_cast<CUfunction>(kernel), grid.x, grid.y, grid.z, block.x, block.y,
                 block.z, 0, static_cast<CUstream>(stream), parameters, nullptr) == CUDA_SUCCESS;
}

bool Driver::push_context(int device) const {
  CUcontext context = nullptr;
  const bool can = retain_ != nullptr && release_ != nullptr && push_ != nullptr && pop_ != nullptr;
  if (!can || retain_(&context, device) != CUDA_SUCCESS) return false;
  if (push_(context) == CUDA_SUCCESS) return true;
  release_(device);
  return false;
}

void Driver::pop_context(int device) const {
  CUcontext context = nullptr;
  pop_(&context);
  release_(device);
}

const Driver& driver() {
  static const Driver found;
  return found;
}

}  // namespace merge_attn_states::cuda
