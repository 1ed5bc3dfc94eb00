// What the kernels of many parts of any kind share: their parameters, where a row's parts lie, what
// these weigh, and elements of a dtype that is known only when they run.
#pragma once

#include <algorithm>

#include "../core/parts_call.h"
#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {

// Parts that each have a layout of their own.
template <int kMost>
struct Table {
  Part parts[kMost];

  __device__ const Part& part(int k) const { return parts[k]; }
  __device__ const void* output(int k) const { return parts[k].output.data; }
  __device__ const void* lse(int k) const { return parts[k].lse.data; }
};

// Parts that differ in their addresses alone.
struct AlikeTable {
  Part first;
  const void* outputs[kMaxAlikeParts];
  const void* lses[kMaxAlikeParts];

  __device__ const Part& part(int) const { return first; }
  __device__ const void* output(int k) const { return outputs[k]; }
  __device__ const void* lse(int k) const { return lses[k]; }
};

template <class Source>
struct AnyCall {
  int64_t sizes[kMaxRowDims];
  FastDivision divisors[kMaxRowDims];  // of the sizes, used where there are fewer than 2^31 rows
  FastDivision packs_per_row;          // used where several rows share a block
  FastDivision parts;
  int64_t num_rows;
  int64_t row_packs;
  int32_t rows;  // of a block
  int32_t num_parts;
  LseRule rule;
  bool few_rows, mixes_bases, invert_empty, out_index_is_64_bit;
  DType out_dtype, sink_dtype;
  PerRow out, out_lse, sink;
  int64_t out_element_stride;
  RowIndex out_index;
  const float* out_scale;
  Gradients gradients;  // of a backward call
  Source source;
};
static_assert(sizeof(AnyCall<Table<kMaxParts>>) <= 32764, "more than a kernel's parameters hold");
static_assert(sizeof(AnyCall<AlikeTable>) <= 32764, "more than a kernel's parameters hold");

template <class Call>
__device__ RowCoordinates coordinates(const Call& call, int64_t row) {
  RowCoordinates result{};
  for (int dim = kMaxRowDims - 1; dim > 0; --dim) {
    if (call.sizes[dim] == 1) continue;
    const int64_t above = call.few_rows
                              ? int64_t{call.divisors[dim].quotient(static_cast<uint32_t>(row))}
                              : row / call.sizes[dim];
    result.of[dim] = row - above * call.sizes[dim];
    row = above;
  }
  result.of[0] = row;
  return result;
}

// As it is stored, -inf where the part is absent or declared empty; `row` becomes the part's own.
template <class Acc, class Call>
__device__ Acc load_lse(const Call& call, int k, RowCoordinates& row) {
  const Part& part = call.source.part(k);
  if (!part.index.find(row, part.index_is_64_bit)) return -INFINITY;
  if (part.empty.data != nullptr &&
      part.is_declared_empty(part.empty.offset(row), call.invert_empty)) {
    return -INFINITY;
  }
  return static_cast<const Acc*>(call.source.lse(k))[part.lse.offset(row)];
}

// The rows that a block has to do with: what each part of each weighs, and where its row lies.
template <class Acc>
struct RowsOfBlock {
  static_assert(kAnyWeights >= kMaxAlikeParts);
  Acc weights[kAnyWeights];  // [rows][num_parts]
  // Null where the part is absent or empty; its weight is NaN there in a row with a NaN.
  const char* parts[kAnyWeights];

  // Called by all threads, for rows [first, first + count); between two calls stands a barrier.
  // Returns what the thread of row threadIdx.x has to know of it.
  template <class Call>
  __device__ Acc weigh(const Call& call, int64_t first, int count, bool wants_lse,
                       Acc& weight_of_sink) {
    const int num_parts = call.num_parts;
    for (int i = threadIdx.x; i < count * num_parts; i += kAnyThreads) {
      const int of_block = static_cast<int>(call.parts.quotient(i)), k = i - of_block * num_parts;
      RowCoordinates row = coordinates(call, first + of_block);
      weights[i] = load_lse<Acc>(call, k, row);
      const Part& part = call.source.part(k);
      parts[i] = isinf(weights[i]) ? nullptr
                                   : static_cast<const char*>(call.source.output(k)) +
                                         part.output.offset(row) * size_of(part.dtype);
    }
    Acc sink{};
    const bool has_sink = call.sink.data != nullptr;
    if (threadIdx.x < count && has_sink) {
      const RowCoordinates row = coordinates(call, first + threadIdx.x);
      sink = load_element<Acc>(call.sink.data, call.sink_dtype, call.sink.offset(row));
    }
    __syncthreads();
    Acc lse{};
    weight_of_sink = Acc(kSkip);
    if (threadIdx.x < count) {
      Acc* const mine = weights + threadIdx.x * num_parts;
      const auto weigh_row = [&](auto lse_of) {
        const auto logit = lse_of(call.rule.out_base, sink);
        const auto weighed = weigh_pair_or_parts<ScalarMath<Acc>, Acc>(
            call.rule, num_parts, [&](int k) { return lse_of(call.source.part(k).base, mine[k]); },
            has_sink ? &logit : nullptr,
            [&](int k) -> Acc& { return k < num_parts ? mine[k] : weight_of_sink; });
        if (wants_lse) lse = weighed.lse();
      };
      if (call.mixes_bases) {
        weigh_row([](Base base, Acc one) {
          return base == Base::kTwo ? natural(one) : PartLse<Acc>{one, Acc(0)};
        });
      } else {
        weigh_row([](Base, Acc one) { return one; });
      }
      if (isinf(sink)) weight_of_sink = Acc(kSkip);  // in a row with a NaN too
    }
    __syncthreads();
    return lse;
  }
};

template <class Source>
void fill(const PartsCall& call, const AnyShape& shape, AnyCall<Source>& parameters) {
  const int64_t num_rows = call.num_rows(), row_packs = call.head_size / shape.elements;
  const bool few_rows = num_rows <= kMaxGridX;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    parameters.sizes[dim] = call.sizes[dim];
    parameters.divisors[dim] = FastDivision(few_rows ? static_cast<uint32_t>(call.sizes[dim]) : 1);
  }
  const bool shares_blocks = shape.rows > 1 && row_packs > 0;
  parameters.packs_per_row = FastDivision(shares_blocks ? static_cast<uint32_t>(row_packs) : 1);
  parameters.parts = FastDivision(static_cast<uint32_t>(call.num_parts));
  parameters.num_rows = num_rows;
  parameters.row_packs = row_packs;
  parameters.rows = shape.rows;
  parameters.num_parts = call.num_parts;
  parameters.rule = call.lse_rule();
  parameters.few_rows = few_rows;
  parameters.mixes_bases = call.mixes_bases;
  parameters.invert_empty = call.invert_empty;
  parameters.out_index_is_64_bit = call.out_index_is_64_bit;
  parameters.out_dtype = call.out_dtype;
  parameters.sink_dtype = call.sink_dtype;
  parameters.out = call.out;
  parameters.out_lse = call.out_lse;
  parameters.sink = call.sink;
  parameters.out_element_stride = call.out_element_stride;
  parameters.out_index = call.out_index;
  parameters.out_scale = call.out_scale;
  parameters.gradients = call.gradients;
}

// Calls f(parameters) with the parameters that hold the parts.
template <class F>
void with_parameters(const PartsCall& call, const AnyShape& shape, F&& f) {
  const auto with_table = [&]<int kMost>(std::integral_constant<int, kMost>) {
    AnyCall<Table<kMost>> parameters;
    std::copy(call.parts.begin(), call.parts.end(), parameters.source.parts);
    fill(call, shape, parameters);
    f(parameters);
  };
  if (!call.is_stack && call.num_parts <= kFewParts) {
    return with_table(std::integral_constant<int, kFewParts>{});
  }
  if (!call.is_stack && call.num_parts <= kMaxParts) {
    return with_table(std::integral_constant<int, kMaxParts>{});
  }
  AnyCall<AlikeTable> parameters;
  parameters.source.first = call.part(0);
  for (int k = 0; k < call.num_parts; ++k) {
    parameters.source.outputs[k] = call.output_data(k);
    parameters.source.lses[k] = call.lse_data(k);
  }
  fill(call, shape, parameters);
  f(parameters);
}

}  // namespace merge_attn_states::cuda
