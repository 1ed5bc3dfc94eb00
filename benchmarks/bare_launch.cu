// The floor of a call on the host: launches from a C loop, with nothing in front of them. The
// kernel is not the merge's own, whose entry validates: it does nothing, and takes what the merge's
// launch takes, as many bytes of parameters, as large a grid and block, and the dependent-launch
// attribute. Compiled by native.py; part of no package.
#include <cuda_runtime.h>

#include <chrono>

namespace {

struct Parameters {
  char bytes[304];  // MergeArgs and Tiles
};

__global__ void nothing(const __grid_constant__ Parameters) {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;");
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

}  // namespace

// Seconds that `count` launches take on the host; negative: a CUDA error.
extern "C" double bare_launch_seconds(int count, int blocks, int threads, void* stream) {
  int device = 0, major = 0;
  cudaGetDevice(&device);
  cudaDeviceGetAttribute(&major, cudaDevAttrComputeCapabilityMajor, device);
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  cudaLaunchConfig_t config{};
  config.gridDim = dim3(static_cast<unsigned>(blocks));
  config.blockDim = dim3(static_cast<unsigned>(threads));
  config.stream = static_cast<cudaStream_t>(stream);
  config.attrs = &overlap;
  config.numAttrs = major >= 9 ? 1 : 0;
  Parameters parameters{};
  using Clock = std::chrono::steady_clock;
  Clock::now();  // its code is in the caches, as in the loops that this one is compared with
  const auto begin = Clock::now();
  for (int i = 0; i < count; ++i) {
    const cudaError_t status = cudaLaunchKernelEx(&config, nothing, parameters);
    if (status != cudaSuccess) return -static_cast<double>(status);
  }
  return std::chrono::duration<double>(Clock::now() - begin).count();
}
