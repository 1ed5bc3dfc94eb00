// What the kernels of parts that lie alike share: one dtype, one layout, no index and no mask, rows
// of 16-byte packs.
#pragma once

#include "../core/parts_call.h"
#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {

// Strides along the two row dimensions: of outputs in packs, of LSEs in elements.
struct PerDim {
  uint32_t outer;
  uint32_t inner;
};

struct AlikeRows {
  uint32_t num_rows;
  FastDivision inner;  // rows of the inner dimension
  PerDim of_parts, of_lses, of_out, of_out_lse, of_sink;
};

struct AlikeRow {
  uint32_t outer;
  uint32_t inner;

  __device__ AlikeRow(const AlikeRows& rows, uint32_t row)
      : outer(rows.inner.quotient(row)), inner(row - outer * rows.inner.divisor) {}
  __device__ uint32_t offset(const PerDim& strides) const {
    return outer * strides.outer + inner * strides.inner;
  }
};

struct Sink {
  const void* data;  // null: none
  DType dtype;

  __device__ float load(uint32_t offset) const { return load_element<float>(data, dtype, offset); }
};

// Elements of a pack.
template <class T>
inline constexpr int kElements = 16 / sizeof(T);

template <class T>
__device__ T* pack_at(void* data, uint32_t row_offset, uint32_t column) {
  return static_cast<T*>(data) + (uint64_t{row_offset} + column) * kElements<T>;
}
template <class T>
__device__ const T* pack_at(const void* data, uint32_t row_offset, uint32_t column) {
  return static_cast<const T*>(data) + (uint64_t{row_offset} + column) * kElements<T>;
}

inline AlikeRows alike_rows(const PartsCall& call) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t elements = 16 / size_of(call.out_dtype);
  const auto per_dim = [&](const PerRow& operand, int64_t unit) -> PerDim {
    return {u32(operand.strides[0] / unit), u32(operand.strides[1] / unit)};
  };
  const Part& part = call.part(0);
  return {.num_rows = u32(call.num_rows()),
          .inner = FastDivision(u32(call.sizes[1])),
          .of_parts = per_dim(part.output, elements),
          .of_lses = per_dim(part.lse, 1),
          .of_out = per_dim(call.out, elements),
          .of_out_lse = per_dim(call.out_lse, 1),
          .of_sink = per_dim(call.sink, 1)};
}

}  // namespace merge_attn_states::cuda
