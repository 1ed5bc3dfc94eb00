// The kernels that a merge is timed between and against: a producer of both parts, a consumer of
// the output, the plain kernel that is the limit, and an empty one. Compiled and loaded by
// kernels.py; part of no package, and knows nothing of a merge.
#include <cuda_runtime.h>

#include <cstdint>

namespace {

constexpr int kThreads = 256;           // of the neighbours and of the empty kernel
constexpr uint32_t kSourceMask = 4095;  // the producer's sources hold 4,096 packs and 4,096 LSEs

// Writes both parts, [packs] each, and both LSEs, [lses] each, out of sources of 4,096.
__global__ void produce(uint4* prefix, uint4* suffix, float* prefix_lse, float* suffix_lse,
                        const uint4* source, const float* prefix_source, const float* suffix_source,
                        uint32_t packs, uint32_t lses) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i < packs) {
    prefix[i] = source[i & kSourceMask];
    suffix[i] = source[(i + 77) & kSourceMask];  // another than the prefix's
  }
  if (i < lses) {
    prefix_lse[i] = prefix_source[i & kSourceMask];
    suffix_lse[i] = suffix_source[i & kSourceMask];
  }
}

// Reads every pack; the store keeps the compiler from leaving the loads out, and never happens.
__global__ void consume(const uint4* output, uint4* sink, uint32_t packs) {
  const uint32_t i = blockIdx.x * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  const uint4 x = output[i];
  if ((x.x ^ x.y ^ x.z ^ x.w) == 0x12345679u) sink[0] = x;
}

__global__ void nothing() {}

__device__ void store(uint4* to, uint4 x, uint4 y) {
  *to = {x.x ^ y.x, x.y ^ y.y, x.z ^ y.z, x.w ^ y.w};
}
__device__ void store(uint2* to, uint4 x, uint4 y) {
  *to = {x.x ^ y.x ^ x.z ^ y.z, x.y ^ y.y ^ x.w ^ y.w};
}

// Reads two buffers and writes one: of as many bytes (uint4), or of half as many (uint2), as a
// merge of 16-bit parts into an FP8 output does.
template <typename Out, int kPacks, bool kDependent>
__global__ void plain(const uint4* a, const uint4* b, Out* c, int64_t packs) {
#if __CUDA_ARCH__ >= 900
  if (kDependent) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  const int64_t first = int64_t{blockIdx.x} * blockDim.x * kPacks + threadIdx.x;
  uint4 x[kPacks], y[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = first + int64_t{k} * blockDim.x;
    if (i < packs) x[k] = a[i], y[k] = b[i];
  }
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    const int64_t i = first + int64_t{k} * blockDim.x;
    if (i < packs) store(&c[i], x[k], y[k]);
  }
}

// Reads so many buffers, which lie one behind the other, and writes one.
template <int kParts, bool kDependent>
__global__ void plain_many(const uint4* parts, uint4* c, int64_t packs) {
#if __CUDA_ARCH__ >= 900
  if (kDependent) {
    asm volatile("griddepcontrol.launch_dependents;");
    asm volatile("griddepcontrol.wait;" ::: "memory");
  }
#endif
  const int64_t i = int64_t{blockIdx.x} * blockDim.x + threadIdx.x;
  if (i >= packs) return;
  uint4 x[kParts];
#pragma unroll
  for (int k = 0; k < kParts; ++k) x[k] = parts[k * packs + i];
#pragma unroll
  for (int k = 1; k < kParts; ++k) {
    x[0] = {x[0].x ^ x[k].x, x[0].y ^ x[k].y, x[0].z ^ x[k].z, x[0].w ^ x[k].w};
  }
  c[i] = x[0];
}

unsigned blocks(int64_t items, int64_t a_block) {
  return static_cast<unsigned>((items + a_block - 1) / a_block);
}

template <typename... Types>
cudaError_t launch_in(void (*kernel)(Types...), int64_t packs, int64_t a_block, int64_t threads,
                      bool dependent, cudaStream_t stream, Types... arguments) {
  cudaLaunchAttribute overlap{};
  overlap.id = cudaLaunchAttributeProgrammaticStreamSerialization;
  overlap.val.programmaticStreamSerializationAllowed = 1;
  const cudaLaunchConfig_t config{
      blocks(packs, a_block), static_cast<unsigned>(threads), 0, stream, &overlap,
      dependent ? 1u : 0u};
  return cudaLaunchKernelEx(&config, kernel, arguments...);
}

template <typename Out, int kPacks>
cudaError_t launch(const uint4* a, const uint4* b, void* c, int64_t packs, int64_t threads,
                   bool dependent, cudaStream_t stream) {
  const auto kernel = dependent ? plain<Out, kPacks, true> : plain<Out, kPacks, false>;
  return launch_in(kernel, packs, threads * kPacks, threads, dependent, stream, a, b,
                   static_cast<Out*>(c), packs);
}

template <int kParts>
cudaError_t launch_many(const uint4* parts, uint4* c, int64_t packs, int64_t threads,
                        bool dependent, cudaStream_t stream) {
  const auto kernel = dependent ? plain_many<kParts, true> : plain_many<kParts, false>;
  return launch_in(kernel, packs, threads, threads, dependent, stream, parts, c, packs);
}

}  // namespace

// Each takes pointers and 64-bit numbers and returns a cudaError_t; packs are those that are read.
extern "C" {

int launch_produce(uint4* prefix, uint4* suffix, float* prefix_lse, float* suffix_lse,
                   const uint4* source, const float* prefix_source, const float* suffix_source,
                   int64_t packs, int64_t lses, cudaStream_t stream) {
  produce<<<blocks(packs > lses ? packs : lses, kThreads), kThreads, 0, stream>>>(
      prefix, suffix, prefix_lse, suffix_lse, source, prefix_source, suffix_source, packs, lses);
  return cudaGetLastError();
}

int launch_consume(const uint4* output, uint4* sink, int64_t packs, cudaStream_t stream) {
  consume<<<blocks(packs, kThreads), kThreads, 0, stream>>>(output, sink, packs);
  return cudaGetLastError();
}

int launch_nothing(int64_t packs, cudaStream_t stream) {
  nothing<<<blocks(packs, kThreads), kThreads, 0, stream>>>();
  return cudaGetLastError();
}

int launch_plain(const uint4* a, const uint4* b, void* c, int64_t packs, int64_t is_narrow,
                 int64_t threads, int64_t packs_a_thread, int64_t is_dependent,
                 cudaStream_t stream) {
  const auto wide = packs_a_thread == 2 ? launch<uint4, 2> : launch<uint4, 1>;
  const auto narrow = packs_a_thread == 2 ? launch<uint2, 2> : launch<uint2, 1>;
  return (is_narrow ? narrow : wide)(a, b, c, packs, threads, is_dependent != 0, stream);
}

int launch_plain_many(const uint4* parts, uint4* c, int64_t packs, int64_t count, int64_t threads,
                      int64_t, int64_t is_dependent, cudaStream_t stream) {
  const auto launch = count == 2   ? launch_many<2>
                      : count == 4 ? launch_many<4>
                      : count == 8 ? launch_many<8>
                                   : launch_many<16>;
  return launch(parts, c, packs, threads, is_dependent != 0, stream);
}

}  // extern "C"
