// The ceiling: a plain kernel that reads two buffers and writes one, 512 threads, one 16-byte pack
// a thread, no dependent launch. The narrow one writes half as many bytes, as a merge of 16-bit
// parts into an FP8 output does. Compiled by native.py; part of no package.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

__global__ void triad(const uint4* a, const uint4* b, uint4* c, int64_t packs) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  const uint4 x = a[i], y = b[i];
  c[i] = {x.x ^ y.x, x.y ^ y.y, x.z ^ y.z, x.w ^ y.w};
}

__global__ void narrow_triad(const uint4* a, const uint4* b, uint2* c, int64_t packs) {
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  const uint4 x = a[i], y = b[i];
  c[i] = {x.x ^ y.x ^ x.z ^ y.z, x.y ^ y.y ^ x.w ^ y.w};
}

}  // namespace

extern "C" int triad_launch(const void* a, const void* b, void* c, int64_t packs, int narrow,
                            void* stream_handle) {
  constexpr int kThreads = 512;
  const auto blocks = static_cast<unsigned>((packs + kThreads - 1) / kThreads);
  const auto stream = static_cast<cudaStream_t>(stream_handle);
  const auto *x = static_cast<const uint4*>(a), *y = static_cast<const uint4*>(b);
  if (narrow) {
    narrow_triad<<<blocks, kThreads, 0, stream>>>(x, y, static_cast<uint2*>(c), packs);
  } else {
    triad<<<blocks, kThreads, 0, stream>>>(x, y, static_cast<uint4*>(c), packs);
  }
  return cudaGetLastError();
}
