// The mark of a function that both the CPU's and the GPU's kernels compile.
#pragma once

#ifdef __CUDACC__
#define MERGE_ATTN_STATES_HOST_DEVICE __host__ __device__ __forceinline__
// Before a loop over an array that a GPU's thread is to hold in registers.
#define MERGE_ATTN_STATES_UNROLL _Pragma("unroll")
#else
#define MERGE_ATTN_STATES_UNROLL
// Always inlined: the CPU kernels are built twice, and one copy of a function that both use must
// not stand for the other.
#define MERGE_ATTN_STATES_HOST_DEVICE inline __attribute__((always_inline))
#endif
