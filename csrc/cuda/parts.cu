// The kernels of many parts that lie alike: one dtype, one layout, no index and no mask, rows of
// 16-byte packs.
//
//   merge_few    up to 16 parts, listed among the parameters: every thread reads its row's LSEs and
//                one pack of each part, weighs for itself, and stores a pack.
//   merge_many   more of them: a block takes one row, its threads share the LSEs, sum sixteen parts
//                each, and then add those sums in their order, as one thread would.
//
// In place is safe: a row belongs to one block, a barrier stands between the reads of its LSEs and
// the store of the merged one, and a pack of the parts is read by the block before it is written.
#include <cstring>

#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

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

struct Row {
  uint32_t outer;
  uint32_t inner;

  __device__ Row(const AlikeRows& rows, uint32_t row)
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

struct FewParts {
  AlikeRows rows;
  uint32_t packs_per_row;
  uint32_t row_factor;  // ceil(2^kRowShift / packs_per_row)
  uint32_t rows_per_block;
  int32_t num_parts;
  bool replaces_an_lse;
  LseRule rule;
  Sink sink;
  void* out;
  float* out_lse;  // null: not asked for
  const float* lses[kFewParts];
  const void* parts[kFewParts];
};

constexpr int kRowShift = 20;  // exact while thread * packs_per_row < 2^20
static_assert(kMaxThreads * kMaxThreads <= 1 << kRowShift);

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

// kMost >= num_parts, so that arrays stay in registers; what is beyond the parts is empty.
template <class T, int kMost>
__global__ void __launch_bounds__(kMaxThreads) merge_few(const __grid_constant__ FewParts call) {
  using PackT = Pack<T, kElements<T>>;
  const uint32_t of_block = threadIdx.x * call.row_factor >> kRowShift;
  const uint32_t column = threadIdx.x - of_block * call.packs_per_row;
  const uint32_t number = blockIdx.x * call.rows_per_block + of_block;
  const bool exists = of_block < call.rows_per_block && number < call.rows.num_rows;
  const Row row(call.rows, exists ? number : 0);
  wait_for_previous();

  float weights[kMost], weight_of_sink;
  PackT packs[kMost];
  PartLse<float> sink{};
  if (exists) {
    const uint32_t lse_offset = row.offset(call.rows.of_lses);
    const uint32_t offset = row.offset(call.rows.of_parts);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      weights[k] = -INFINITY;
      if (k < call.num_parts) weights[k] = load_global(call.lses[k] + lse_offset);
    }
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      packs[k] = PackT{};
      if (k < call.num_parts) packs[k] = PackT::load(pack_at<T>(call.parts[k], offset, column));
    }
    if (call.sink.data != nullptr) sink.high = call.sink.load(row.offset(call.rows.of_sink));
  }
  if (call.replaces_an_lse) __syncthreads();
  if (!exists) return;
  const bool wants_lse = call.out_lse != nullptr && column == 0;
  const float lse = weigh_parts<ScalarMath<float>, float>(
      call.rule, kMost,
      [&](int k) {
        return PartLse<float>{weights[k], 0.0f};
      },
      call.sink.data != nullptr ? &sink : nullptr, wants_lse,
      [&](int k) -> float& { return k < kMost ? weights[k] : weight_of_sink; });

  SumOfParts<float> sums[kElements<T>];
  int seen = 0;
  bool is_whole = false;  // a part of weight 1
  PackT merged{};
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    if (weights[k] < 0.0f) continue;
    ++seen;
    is_whole = weights[k] == 1.0f;
    merged = packs[k];
    float values[kElements<T>];
    packs[k].unpack(values);
#pragma unroll
    for (int i = 0; i < kElements<T>; ++i) sums[i].add(weights[k], values[i]);
  }
  const bool copies = seen == 1 && is_whole;  // byte for byte
  if (seen > 0 && !copies) {
    float values[kElements<T>];
#pragma unroll
    for (int i = 0; i < kElements<T>; ++i) values[i] = sums[i].value();
    merged = PackT::pack(values);
  }
  merged.store(pack_at<T>(call.out, row.offset(call.rows.of_out), column));
  if (wants_lse) store_global(call.out_lse + row.offset(call.rows.of_out_lse), lse);
}

// Parts at equal distances, or a table of their addresses.
struct Stacked {
  const void* data;
  const float* lse;
  uint64_t output_step;  // bytes
  uint64_t lse_step;     // elements

  __device__ const void* part(int k) const {
    return static_cast<const char*>(data) + k * output_step;
  }
  __device__ const float* lse_of(int k) const { return lse + k * lse_step; }
};
struct Listed {
  const void* data[kMaxAlikeParts];
  const float* lse[kMaxAlikeParts];

  __device__ const void* part(int k) const { return data[k]; }
  __device__ const float* lse_of(int k) const { return lse[k]; }
};

template <class Source>
struct ManyParts {
  AlikeRows rows;
  uint32_t packs_per_row;
  int32_t num_parts;
  LseRule rule;
  Sink sink;
  void* out;
  float* out_lse;
  Source source;
};
static_assert(sizeof(ManyParts<Listed>) <= 32764, "more than a kernel's parameters hold");

// The weights of a row's parts in `terms`, by all threads of the block; returns the merged LSE.
__device__ float weigh_in_block(const LseRule& rule, int count, bool has_sink, float sink,
                                float* lses, float* terms, bool wants_lse) {
  using Lses = ManyLses<ScalarMath<float>, float>;
  constexpr int kAtOnce = SumOfParts<float>::kAtOnce;
  __shared__ float largest[kManyThreads / 32];
  __shared__ float sums[kMaxAlikeParts / kAtOnce + 1];
  Lses merged(rule.base);
  const int count_with_sink = count + has_sink;
  const auto lse_of = [&](int k) { return PartLse<float>{k < count ? lses[k] : sink, 0.0f}; };
  // Each thread some parts side by side, so that what is found keeps to the parts' order.
  const int each = (count_with_sink + kManyThreads - 1) / kManyThreads;
  const int first = min(static_cast<int>(threadIdx.x) * each, count_with_sink);
  for (int k = first; k < min(first + each, count_with_sink); ++k) merged.find(lse_of(k));
  for (int lanes = 1; lanes < 32; lanes *= 2) {
    merged.find({__shfl_down_sync(0xffffffffu, merged.largest().high, lanes), 0.0f});
  }
  if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = merged.largest().high;
  __syncthreads();
  merged = Lses(rule.base);
  for (int warp = 0; warp < kManyThreads / 32; ++warp) merged.find({largest[warp], 0.0f});

  for (int k = threadIdx.x; k < count_with_sink; k += kManyThreads) {
    terms[k] = merged.term(lse_of(k));
  }
  __syncthreads();
  const int groups = (count_with_sink + kAtOnce - 1) / kAtOnce;
  if (threadIdx.x < groups) {
    SumOfParts<float> sum;
    const int begin = threadIdx.x * kAtOnce;
    for (int k = begin; k < min(begin + kAtOnce, count_with_sink); ++k) {
      sum.add(Lses::summand(terms[k]));
    }
    sums[threadIdx.x] = sum.value();
  }
  __syncthreads();
  SumOfParts<float> total;
  for (int group = 0; group < groups; ++group) {
    total.add_sixteen(sums[group]);
  }
  const float sum = total.value();
  for (int k = threadIdx.x; k < count; k += kManyThreads) terms[k] = Lses::weight(terms[k], sum);
  __syncthreads();
  return wants_lse ? in_out_base<float>(rule, merged.lse(sum)) : 0.0f;
}

template <class T, class Source>
__global__ void __launch_bounds__(kManyThreads)
    merge_many(const __grid_constant__ ManyParts<Source> call) {
  using PackT = Pack<T, kElements<T>>;
  constexpr int kAtOnce = SumOfParts<float>::kAtOnce;
  constexpr int kThreadsAPack = kManyThreads / kManyPacks;
  __shared__ float lses[kMaxAlikeParts];
  __shared__ float weights[kMaxAlikeParts + 1];
  __shared__ float sums[kMaxAlikeParts / kAtOnce][kManyPacks][kElements<T>];
  __shared__ int seen, alone;
  const Row row(call.rows, blockIdx.x);
  const int count = call.num_parts, groups = (count + kAtOnce - 1) / kAtOnce;
  if (threadIdx.x == 0) seen = 0, alone = -1;
  wait_for_previous();

  const uint32_t lse_offset = row.offset(call.rows.of_lses);
  for (int k = threadIdx.x; k < count; k += kManyThreads) {
    lses[k] = load_global(call.source.lse_of(k) + lse_offset);
  }
  const bool has_sink = call.sink.data != nullptr;
  const float sink = has_sink ? call.sink.load(row.offset(call.rows.of_sink)) : 0.0f;
  __syncthreads();
  const bool wants_lse = call.out_lse != nullptr && threadIdx.x == 0;
  const float lse = weigh_in_block(call.rule, count, has_sink, sink, lses, weights, wants_lse);
  if (wants_lse) store_global(call.out_lse + row.offset(call.rows.of_out_lse), lse);

  for (int k = threadIdx.x; k < count; k += kManyThreads) {
    if (weights[k] < 0.0f) continue;
    atomicAdd(&seen, 1);
    if (weights[k] == 1.0f) alone = k;  // no other part is seen, or it does not matter
  }
  __syncthreads();
  const bool copies = seen == 1 && alone >= 0;  // byte for byte

  const uint32_t offset = row.offset(call.rows.of_parts), to = row.offset(call.rows.of_out);
  const uint32_t pack = threadIdx.x % kManyPacks, first_group = threadIdx.x / kManyPacks;
  for (uint32_t begin = 0; begin < call.packs_per_row; begin += kManyPacks) {
    const uint32_t column = begin + pack;
    const bool exists = column < call.packs_per_row;
    for (int group = first_group; exists && group < groups; group += kThreadsAPack) {
      PackT packs[kAtOnce];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int part = group * kAtOnce + k;
        packs[k] = PackT{};
        if (part < count && !(weights[part] < 0.0f)) {
          packs[k] = PackT::load(pack_at<T>(call.source.part(part), offset, column));
        }
      }
      SumOfParts<float> sum[kElements<T>];
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int part = group * kAtOnce + k;
        if (part >= count || weights[part] < 0.0f) continue;
        float values[kElements<T>];
        packs[k].unpack(values);
#pragma unroll
        for (int i = 0; i < kElements<T>; ++i) sum[i].add(weights[part], values[i]);
      }
#pragma unroll
      for (int i = 0; i < kElements<T>; ++i) sums[group][pack][i] = sum[i].value();
    }
    __syncthreads();
    if (first_group == 0 && exists) {
      PackT merged{};
      if (copies) {
        merged = PackT::load(pack_at<T>(call.source.part(alone), offset, column));
      } else if (seen > 0) {
        float values[kElements<T>];
#pragma unroll
        for (int i = 0; i < kElements<T>; ++i) {
          SumOfParts<float> total;
          for (int group = 0; group < groups; ++group) total.add_sixteen(sums[group][pack][i]);
          values[i] = total.value();
        }
        merged = PackT::pack(values);
      }
      merged.store(pack_at<T>(call.out, to, column));
    }
    __syncthreads();
  }
}

AlikeRows alike_rows(const PartsCall& call) {
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

const void* part_address(const PartsCall& call, int k) {
  const Part& part = call.part(k);
  return static_cast<const char*>(part.output.data) +
         call.output_offset(k) * size_of(call.out_dtype);
}

const float* lse_address(const PartsCall& call, int k) {
  return static_cast<const float*>(call.part(k).lse.data) + call.lse_offset(k);
}

bool replaces_an_lse(const PartsCall& call) {
  bool replaces = false;
  for (int k = 0; k < call.num_parts; ++k) replaces |= lse_address(call, k) == call.out_lse.data;
  return replaces;
}

void launch_few(const PartsCall& call, const AlikeShape& shape) {
  FewParts parameters{.rows = alike_rows(call),
                      .packs_per_row = static_cast<uint32_t>(shape.packs_per_row),
                      .row_factor = static_cast<uint32_t>(
                          ((1 << kRowShift) + shape.packs_per_row - 1) / shape.packs_per_row),
                      .rows_per_block = static_cast<uint32_t>(shape.rows),
                      .num_parts = call.num_parts,
                      .replaces_an_lse = replaces_an_lse(call),
                      .rule = call.lse_rule(),
                      .sink = {call.sink.data, call.sink_dtype},
                      .out = call.out.data,
                      .out_lse = static_cast<float*>(call.out_lse.data),
                      .lses = {},
                      .parts = {}};
  for (int k = 0; k < call.num_parts; ++k) {
    parameters.lses[k] = lse_address(call, k);
    parameters.parts[k] = part_address(call, k);
  }
  const Grid grid{.blocks = (call.num_rows() - 1) / shape.rows + 1, .threads = shape.threads};
  dispatch_floats(call.out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto& few = call.num_parts <= 4   ? kernel<merge_few<T, 4>>()
                      : call.num_parts <= 8 ? kernel<merge_few<T, 8>>()
                                            : kernel<merge_few<T, kFewParts>>();
    launch(few, grid, call, parameters);
  });
}

template <class Source>
void launch_many(const PartsCall& call, const AlikeShape& shape, const Source& source) {
  const ManyParts<Source> parameters{.rows = alike_rows(call),
                                     .packs_per_row = static_cast<uint32_t>(shape.packs_per_row),
                                     .num_parts = call.num_parts,
                                     .rule = call.lse_rule(),
                                     .sink = {call.sink.data, call.sink_dtype},
                                     .out = call.out.data,
                                     .out_lse = static_cast<float*>(call.out_lse.data),
                                     .source = source};
  const Grid grid{.blocks = call.num_rows(), .threads = kManyThreads};
  dispatch_floats(call.out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kernel<merge_many<T, Source>>(), grid, call, parameters);
  });
}

}  // namespace

void launch_alike(const PartsCall& call, const AlikeShape& shape) {
  if (call.num_parts <= kFewParts) return launch_few(call, shape);
  if (call.is_stack) {
    return launch_many(call, shape,
                       Stacked{.data = call.part(0).output.data,
                               .lse = static_cast<const float*>(call.part(0).lse.data),
                               .output_step = static_cast<uint64_t>(call.stack_output_stride *
                                                                    size_of(call.out_dtype)),
                               .lse_step = static_cast<uint64_t>(call.stack_lse_stride)});
  }
  Listed listed;
  for (int k = 0; k < call.num_parts; ++k) {
    listed.data[k] = part_address(call, k);
    listed.lse[k] = lse_address(call, k);
  }
  launch_many(call, shape, listed);
}

}  // namespace merge_attn_states::cuda
