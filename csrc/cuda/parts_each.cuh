// What the kernels of few parts share, each of which has a layout of its own: their parameters, and
// a row's parts in the registers of one thread.
#pragma once

#include "../core/parts_call.h"
#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "parts_row.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {

template <int kMost>
struct EachCall {
  uint32_t num_rows;
  uint32_t rows;       // of a block
  FastDivision lanes;  // of a row; backward a power of two
  uint32_t head_size;
  FastDivision sizes[kMaxRowDims];
  bool has_more_dims;  // than two
  bool needs_barrier, invert_empty;
  bool writes_by_index;  // what is written is the row of the first part, which has no mask
  int32_t num_parts;
  LseRule rule;
  DType out_dtype, sink_dtype;
  PerRow out, out_lse, sink;
  Gradients gradients;  // of a backward call
  Part parts[kMost];
};

struct ShortRow {
  uint32_t of[kMaxRowDims];
};

template <int kMost>
__device__ ShortRow short_row(const EachCall<kMost>& call, uint32_t number) {
  ShortRow row{};
  const auto divide = [&](int dim) {
    const uint32_t above = call.sizes[dim].quotient(number);
    row.of[dim] = number - above * call.sizes[dim].divisor;
    number = above;
  };
  if (call.has_more_dims) {
    divide(3);
    divide(2);
  }
  divide(1);
  row.of[0] = number;
  return row;
}

// One instruction a dimension, since strides are short and not negative; the compiler takes three.
template <int kMost>
__device__ uint64_t offset_of(const EachCall<kMost>& call, const PerRow& operand,
                              const ShortRow& row) {
  uint64_t offset = 0;
  const auto add = [&](int dim) {
    asm("mad.wide.u32 %0, %1, %2, %0;"
        : "+l"(offset)
        : "r"(row.of[dim]), "r"(static_cast<uint32_t>(operand.strides[dim])));
  };
  add(0);
  add(1);
  if (call.has_more_dims) {
    add(2);
    add(3);
  }
  return offset;
}

// The parts of a row at some packs, of 16 bytes of the first part. First is that part's dtype, and
// Rest that of all others; kSelects says whether there are indices or masks.
template <class First, class Rest, int kMost, bool kSelects>
struct EachRow {
  static constexpr int kElements = 16 / sizeof(First);
  static constexpr int kPacks = each_elements(kMost, kSelects) / kElements;
  using Call = EachCall<kMost>;
  template <int k>
  using Of = std::conditional_t<k == 0, First, Rest>;

  float weights[kMost];  // at first the LSEs; -inf where the part is absent or declared empty
  Pack<First, kElements> first[kPacks];
  Pack<Rest, kElements> rest[kMost - 1][kPacks];

  // The packs of a lane lie a row's lanes apart, so that the loads of a warp lie side by side.
  static __device__ uint32_t column(const Call& call, uint32_t lane, int i) {
    return (lane + i * call.lanes.divisor) * kElements;
  }
  static __device__ bool has_pack(const Call& call, uint32_t lane, int i) {
    return column(call, lane, i) < call.head_size;
  }

  // The row of each part, where it has one that is not declared empty.
  struct Places {
    ShortRow of[kMost];
    bool has[kMost];
  };

  // Every index is under way before the first is used.
  static __device__ Places find(const Call& call, const ShortRow& row) {
    Places places;
    for_each_part<kMost>([&](auto k) {
      places.of[k] = row;
      places.has[k] = k < call.num_parts;
    });
    if constexpr (kSelects) {
      int64_t at[kMost];
      for_each_part<kMost>([&](auto k) {
        const Part& part = call.parts[k];
        at[k] = row.of[0];
        if (part.index.data == nullptr) return;
        const uint64_t place = uint64_t{row.of[0]} * static_cast<uint32_t>(part.index.stride);
        at[k] = part.index_is_64_bit
                    ? load_global(static_cast<const int64_t*>(part.index.data) + place)
                    : load_global(static_cast<const int32_t*>(part.index.data) + place);
      });
      for_each_part<kMost>([&](auto k) {
        const RowIndex& index = call.parts[k].index;
        if (index.data == nullptr) return;
        places.has[k] = places.has[k] && index.has(at[k]);
        places.of[k].of[0] = static_cast<uint32_t>(at[k]);
      });
      for_each_part<kMost>([&](auto k) {
        const Part& part = call.parts[k];
        if (part.empty.data == nullptr || !places.has[k]) return;
        const uint64_t offset = offset_of(call, part.empty, places.of[k]);
        places.has[k] = !part.is_declared_empty(offset, call.invert_empty);
      });
    }
    return places;
  }
  // LSEs and values are all under way before the first is used, those of empty parts too.
  __device__ void load(const Call& call, const Places& places, uint32_t lane) {
    for_each_part<kMost>([&](auto k) {
      const PerRow& lse = call.parts[k].lse;
      weights[k] = -INFINITY;
      if (places.has[k]) {
        weights[k] =
            load_global(static_cast<const float*>(lse.data) + offset_of(call, lse, places.of[k]));
      }
    });
    bool is_inside[kPacks];
#pragma unroll
    for (int i = 0; i < kPacks; ++i) is_inside[i] = has_pack(call, lane, i);
    for_each_part<kMost>([&](auto k) {
      using T = Of<k>;
      const PerRow& output = call.parts[k].output;
      const T* const from = static_cast<const T*>(output.data) +
                            (offset_of(call, output, places.of[k]) + column(call, lane, 0));
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        Pack<T, kElements> pack{};
        if (places.has[k] && is_inside[i]) {
          pack = Pack<T, kElements>::load(from + i * call.lanes.divisor * kElements);
        }
        if constexpr (k == 0) {
          first[i] = pack;
        } else {
          rest[k - 1][i] = pack;
        }
      }
    });
  }
  // Turns the LSEs into weights. A larger table than of two is no pair's.
  __device__ auto weigh(const Call& call, const float* sink, float& weight_of_sink) {
    const auto part = [&](int k) { return weights[k]; };
    const auto weight = [&](int k) -> float& { return k < kMost ? weights[k] : weight_of_sink; };
    if constexpr (kMost == 2) {
      return weigh_pair_or_parts<ScalarMath<float>, float>(call.rule, kMost, part, sink, weight);
    } else {
      return weigh_parts<ScalarMath<float>, float>(call.rule, kMost, part, sink, weight);
    }
  }
  // The part that is all of the row and is to be taken byte for byte, or kSummed or kNoPart.
  __device__ int taken() const {
    int taken = kNoPart;
    for_each_part<kMost>([&](auto k) {
      if (weights[k] < 0.0f) return;
      taken = taken == kNoPart && weights[k] == 1.0f ? int{k} : kSummed;
    });
    return taken;
  }
  // The sum of the parts that are not empty, by their weights. -0 is what changes no sum.
  __device__ void sum(float (&values)[kPacks][kElements]) const {
#pragma unroll
    for (auto& of_pack : values) {
#pragma unroll
      for (float& value : of_pack) value = -0.0f;
    }
    for_each_part<kMost>([&](auto k) {
      if (weights[k] < 0.0f) return;
#pragma unroll
      for (int i = 0; i < kPacks; ++i) {
        float of_part[kElements];
        pack(k, i).unpack(of_part);
#pragma unroll
        for (int j = 0; j < kElements; ++j) {
          values[i][j] = add_product(values[i][j], weights[k], of_part[j]);
        }
      }
    });
  }
  // Pack i of part k.
  template <int k>
  __device__ const auto& pack(std::integral_constant<int, k>, int i) const {
    if constexpr (k == 0) {
      return first[i];
    } else {
      return rest[k - 1][i];
    }
  }
};

// The parameters that hold the parts, in so large a table.
template <int kMost>
EachCall<kMost> each_call(const PartsCall& call, const EachShape& shape) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  EachCall<kMost> parameters{.num_rows = u32(call.num_rows()),
                             .rows = u32(shape.rows),
                             .lanes = FastDivision(u32(shape.lanes)),
                             .head_size = u32(call.head_size),
                             .sizes = {},
                             .has_more_dims = call.sizes[2] != 1 || call.sizes[3] != 1,
                             // The lanes of a row that lies in one warp read its LSEs at once.
                             .needs_barrier = call.replaces_an_lse() && 32 % shape.lanes != 0,
                             .invert_empty = call.invert_empty,
                             .writes_by_index = call.out_index.data != nullptr,
                             .num_parts = call.num_parts,
                             .rule = call.lse_rule(),
                             .out_dtype = call.out_dtype,
                             .sink_dtype = call.sink_dtype,
                             .out = call.out,
                             .out_lse = call.out_lse,
                             .sink = call.sink,
                             .gradients = call.gradients,
                             .parts = {}};
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    parameters.sizes[dim] = FastDivision(u32(call.sizes[dim]));
  }
  for (int k = 0; k < call.num_parts; ++k) {
    parameters.parts[k] = call.part(k);
    parameters.parts[k].output.data = call.output_data(k);
    parameters.parts[k].lse.data = call.lse_data(k);
  }
  return parameters;
}

}  // namespace merge_attn_states::cuda
