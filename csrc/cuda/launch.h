// What the launchers of all kernel families share: a launch that is checked, and CUDA's
// programmatic dependent launch where it is asked for.
#pragma once

#include <cuda_runtime.h>

#include "../core/merge_call.h"

namespace merge_attn_states::cuda {

struct Grid {
  int64_t blocks;
  int64_t blocks_y = 1;
  int threads;
};

// Throws CudaError or Unavailable with a sentence that says what to do.
void check(cudaError_t status, int device);

// A kernel and the driver's handle of it, which is good on every device. Without one, where the
// runtime had none to give, the runtime launches.
template <class Parameters>
struct Kernel {
  explicit Kernel(void (*kernel)(Parameters)) : function(reinterpret_cast<const void*>(kernel)) {
    if (cudaGetKernel(&handle, function) != cudaSuccess) handle = nullptr;
  }
  const void* function;
  cudaKernel_t handle = nullptr;
};

// Asks for the handle once.
template <auto kFunction>
const auto& kernel() {
  static const Kernel found(kFunction);
  return found;
}

// Where a kernel is launched, and how.
struct Target {
  int32_t device_index;
  bool dependent_launch;
  void* stream;
};

void launch(const void* function, cudaKernel_t handle, const Grid& grid, const Target& target,
            const void* parameters);

template <class Parameters, class Call>
void launch(const Kernel<Parameters>& kernel, const Grid& grid, const Call& call,
            const Parameters& parameters) {
  launch(kernel.function, kernel.handle, grid,
         Target{call.device_index, call.dependent_launch, call.stream}, &parameters);
}

#ifdef __CUDACC__
// A kernel that is launched dependent may begin while the one before it ends: it touches no memory
// before this. It says nothing to the kernel after it, which so begins behind its last store: one
// that does not wait would otherwise overwrite what is still to be read.
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}
#endif

}  // namespace merge_attn_states::cuda
