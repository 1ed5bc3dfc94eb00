// The ceiling: a plain kernel that reads two buffers and writes one, 512 threads, one 16-byte pack
// a thread, no dependent launch. Compiled by triad.py; part of no package.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__global__ void triad(const uint4* a, const uint4* b, uint4* c, int64_t packs) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  const uint4 x = a[i], y = b[i];
  c[i] = {x.x ^ y.x, x.y ^ y.y, x.z ^ y.z, x.w ^ y.w};
}

}  // namespace

extern "C" int triad_launch(const void* a, const void* b, void* c, int64_t packs, void* stream) {
  constexpr int kThreads = 512;
  triad<<<static_cast<unsigned>((packs + kThreads - 1) / kThreads), kThreads, 0,
          static_cast<cudaStream_t>(stream)>>>(
      static_cast<const uint4*>(a), static_cast<const uint4*>(b), static_cast<uint4*>(c), packs);
  return cudaGetLastError();
}
