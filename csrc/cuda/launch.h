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

template <class Parameters>
void launch(void (*kernel)(Parameters), const Grid& grid, const MergeCall& call,
            const Parameters& parameters) {
  cudaLaunchAttribute dependent{};
  dependent.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  dependent.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks), static_cast<unsigned>(grid.blocks_y));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = &dependent;
  config.numAttrs = call.dependent_launch ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters), call.device_index);
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
