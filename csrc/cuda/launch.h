// What a kernel family's launcher needs: a launch that is checked, and programmatic dependent
// launch where the device has it.
#pragma once

#include <cuda_runtime.h>

#include "../core/merge_call.h"
#include "tile.h"

namespace merge_attn_states::cuda {

inline constexpr int64_t kMaxGridX = 2147483647;

struct Grid {
  int64_t blocks;  // at most kMaxGridX
  int threads;
  bool overlaps_previous;  // the kernel begins with wait_for_previous()
};

// Throws CudaError with a sentence that says what to do.
void check(cudaError_t status, int device);

template <class... Parameters>
void launch(void (*kernel)(Parameters...), const Grid& grid, const MergeCall& call,
            const Parameters&... parameters) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(grid.blocks));
  config.blockDim = dim3(static_cast<unsigned>(grid.threads));
  config.stream = static_cast<cudaStream_t>(call.stream);
  config.attrs = &overlap;
  config.numAttrs = grid.overlaps_previous ? 1 : 0;
  check(cudaLaunchKernelEx(&config, kernel, parameters...), call.device_index);
}

// 16-byte packs in a row of the vectorized kernel.
inline int64_t packs_per_row(const MergeCall& call) {
  return call.geometry.head_size * size_of(call.input_dtype) / 16;
}

void launch_vectorized(const MergeCall& call, const Tile& tile, bool overlaps_previous);
void launch_generic(const MergeCall& call, const GenericShape& shape, bool overlaps_previous);

#ifdef __CUDACC__
// Programmatic dependent launch (sm_90 and later): the next kernel of the stream may be set up
// while this one runs, and waits until this one has finished and its writes are seen. 0.3 us off
// every size (H100 and H200, 2026-11).
__device__ __forceinline__ void wait_for_previous() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Once every block has said so, or has ended, the next kernel's blocks take the places that become
// free, compute their addresses and wait. Said behind the wait and in front of the loads,
// 2048x16x128 bfloat16 takes 3.8 to 4.0 us warm and 9.95 cold; behind the weights 4.4 and 10.4
// (H100, 2026-11-26). Not in front of the wait: a kernel that starts while this one runs could then
// find the one before this unfinished.
__device__ __forceinline__ void launch_next() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
#endif
}

// Left to itself the compiler computes an address where it is used, behind the wait.
template <class... Pointers>
__device__ __forceinline__ void compute_now(Pointers&... pointers) {
  const auto one = [](auto& pointer) { asm volatile("" : "+l"(pointer)); };
  (one(pointers), ...);
}
#endif

}  // namespace merge_attn_states::cuda
