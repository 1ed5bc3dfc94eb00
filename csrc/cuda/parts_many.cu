// The kernel of more parts that lie alike than parts_few.cu takes: a block takes some packs of one
// row, its threads share the LSEs, sum sixteen parts each, and then add those sums in their order,
// as one thread would.
//
// In place is safe: a barrier stands between the reads of a row's LSEs and the store of the merged
// one, which is no part's where several blocks share a row, and a pack of the parts is read by the
// block before it is written.
#include <algorithm>

#include "parts_alike.cuh"
#include "parts_row.cuh"

namespace merge_attn_states::cuda {
namespace {

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
  uint32_t packs_per_block;
  int32_t num_parts;
  LseRule rule;
  Sink sink;
  void* out;
  float* out_lse;
  Source source;
};
static_assert(sizeof(ManyParts<Listed>) <= 32764, "more than a kernel's parameters hold");

// What a block knows of its row's parts once they are weighed.
struct ManyWeights {
  using Lses = ManyLses<ScalarMath<float>, float>;
  static constexpr int kAtOnce = SumOfParts<float>::kAtOnce;
  static_assert(kManyThreads % 32 == 0 && kMaxAlikeParts % kManyThreads == 0);
  static_assert(kMaxAlikeParts / kAtOnce + 1 <= kManyThreads);

  float terms[kMaxAlikeParts];
  float largest[kManyThreads / 32];
  float sums[kMaxAlikeParts / kAtOnce + 1];
  int one;  // the part that is not empty, if there is one

  // Called by all threads, each with the LSEs of parts threadIdx.x, + kManyThreads, ...
  struct Result {
    float sum, reciprocal, lse;
    int taken;  // as parts_row.cuh says it
  };
  template <int kEach>
  __device__ Result weigh(const LseRule& rule, int count, const float (&lses)[kEach],
                          const float* sink) {
    Lses merged(rule.base);
#pragma unroll
    for (int i = 0; i < kEach; ++i) merged.find(lses[i]);
    float mine = merged.largest();
    for (int lanes = 16; lanes > 0; lanes /= 2) {
      mine = fmaxf(mine, __shfl_xor_sync(0xffffffffu, mine, lanes));
    }
    if (threadIdx.x % 32 == 0) largest[threadIdx.x / 32] = mine;
    __syncthreads();
#pragma unroll
    for (int warp = 0; warp < kManyThreads / 32; ++warp) merged.find(largest[warp]);
    if (sink != nullptr) merged.find(*sink);

    int seen = 0, seen_last = 0;
#pragma unroll
    for (int i = 0; i < kEach; ++i) {
      const int k = threadIdx.x + i * kManyThreads;
      if (k >= count) break;
      terms[k] = merged.term(lses[i]);
      if (terms[k] < 0.0f) continue;
      ++seen;
      seen_last = k;
    }
    const bool several = __syncthreads_or(seen > 1);
    const int threads = __syncthreads_count(seen > 0);
    const bool is_one = threads == 1 && !several;
    if (is_one && seen == 1) one = seen_last;
    // In the order of the parts and the sink behind them: sixteen and sixteen, then their sums.
    const int groups = count / kAtOnce + 1;
    if (threadIdx.x < groups) {
      SumOfParts<float> sum;
      const int begin = threadIdx.x * kAtOnce;
      for (int k = begin; k < min(begin + kAtOnce, count); ++k) sum.add(Lses::summand(terms[k]));
      const bool is_last = threadIdx.x == groups - 1;
      if (is_last && sink != nullptr) sum.add(Lses::summand(merged.term(*sink)));
      sums[threadIdx.x] = sum.value();
    }
    __syncthreads();
    SumOfParts<float> total;
    for (int group = 0; group < groups; ++group) total.add_sixteen(sums[group]);
    const float sum = total.value(), reciprocal = ScalarMath<float>::reciprocal(sum);
    const bool is_alone = is_one && Lses::weight(terms[one], sum, reciprocal) == 1.0f;
    return {.sum = sum,
            .reciprocal = reciprocal,
            .lse = threadIdx.x == 0 ? in_out_base<float>(rule, merged.lse(sum)) : 0.0f,
            .taken = is_alone                     ? one
                     : threads == 0 && sum == sum ? kNoPart
                                                  : kSummed};
  }
  __device__ float weight(int k, const Result& of_row) const {
    return Lses::weight(terms[k], of_row.sum, of_row.reciprocal);
  }
};

template <class T, class Source>
__global__ void __launch_bounds__(kManyThreads)
    merge_many(const __grid_constant__ ManyParts<Source> call) {
  using PackT = Pack<T, kElements<T>>;
  constexpr int kAtOnce = SumOfParts<float>::kAtOnce, kColumns = kManyPacks * kElements<T>;
  constexpr int kThreadsAPack = kManyThreads / kManyPacks;
  static_assert(kColumns <= kManyThreads && kManyThreads % kManyPacks == 0);
  __shared__ ManyWeights parts;
  __shared__ float sums[kMaxAlikeParts / kAtOnce][kColumns];
  const AlikeRow row(call.rows, blockIdx.x);
  const int count = call.num_parts, groups = (count + kAtOnce - 1) / kAtOnce;
  const uint32_t pack = threadIdx.x % kManyPacks, first_group = threadIdx.x / kManyPacks;
  const uint32_t first = blockIdx.y * call.packs_per_block;
  const uint32_t end = min(first + call.packs_per_block, call.packs_per_row);
  wait_for_previous();

  // The values that are summed first are under way while the parts are weighed, empty or not.
  const uint32_t offset = row.offset(call.rows.of_parts), to = row.offset(call.rows.of_out);
  PackT packs[kAtOnce];
#pragma unroll
  for (int k = 0; k < kAtOnce; ++k) {
    const int part = first_group * kAtOnce + k;
    packs[k] = PackT{};
    if (part < count && first + pack < end) {
      packs[k] = PackT::load(pack_at<T>(call.source.part(part), offset, first + pack));
    }
  }
  const uint32_t lse_offset = row.offset(call.rows.of_lses);
  float lses[kMaxAlikeParts / kManyThreads];
#pragma unroll
  for (int i = 0; i < kMaxAlikeParts / kManyThreads; ++i) {
    const int k = threadIdx.x + i * kManyThreads;
    lses[i] = k < count ? load_global(call.source.lse_of(k) + lse_offset) : -INFINITY;
  }
  const bool has_sink = call.sink.data != nullptr;
  const float sink = has_sink ? call.sink.load(row.offset(call.rows.of_sink)) : 0.0f;
  const auto of_row = parts.weigh(call.rule, count, lses, has_sink ? &sink : nullptr);
  if (call.out_lse != nullptr && threadIdx.x == 0 && blockIdx.y == 0) {
    store_global(call.out_lse + row.offset(call.rows.of_out_lse), of_row.lse);
  }

  for (uint32_t begin = first; begin < end; begin += kManyPacks) {
    const uint32_t column = begin + pack;
    for (int group = first_group; column < end && group < groups; group += kThreadsAPack) {
      const bool is_loaded = begin == first && group == static_cast<int>(first_group);
      SumOfParts<float> sum[kElements<T>];
#pragma unroll
      for (int k = 0; !is_loaded && k < kAtOnce; ++k) {
        const int part = group * kAtOnce + k;
        if (part >= count || parts.terms[part] < 0.0f) continue;
        packs[k] = PackT::load(pack_at<T>(call.source.part(part), offset, column));
      }
#pragma unroll
      for (int k = 0; k < kAtOnce; ++k) {
        const int part = group * kAtOnce + k;
        if (part >= count) break;
        const float weight = parts.weight(part, of_row);
        if (weight < 0.0f) continue;
        float values[kElements<T>];
        packs[k].unpack(values);
#pragma unroll
        for (int i = 0; i < kElements<T>; ++i) sum[i].add(weight, values[i]);
      }
#pragma unroll
      for (int i = 0; i < kElements<T>; ++i) {
        sums[group][pack * kElements<T> + i] = sum[i].value();
      }
    }
    __syncthreads();
    const uint32_t element = begin * kElements<T> + threadIdx.x;
    if (threadIdx.x < kColumns && element < end * kElements<T>) {
      T merged{};
      if (of_row.taken >= 0) {
        merged = pack_at<T>(call.source.part(of_row.taken), offset, 0)[element];
      } else if (of_row.taken == kSummed) {
        SumOfParts<float> total;
        for (int group = 0; group < groups; ++group) total.add_sixteen(sums[group][threadIdx.x]);
        merged = Element<T>::store(total.value());
      }
      pack_at<T>(call.out, to, 0)[element] = merged;
    }
    __syncthreads();
  }
}

template <class Source>
void launch_from(const PartsCall& call, const AlikeShape& shape, const Source& source) {
  const uint32_t packs = shape.packs_per_row;
  // Blocks that share a row may not replace what the others still read.
  const uint32_t of_block = call.replaces_an_lse() ? packs : std::min<uint32_t>(kManyPacks, packs);
  const ManyParts<Source> parameters{.rows = alike_rows(call),
                                     .packs_per_row = packs,
                                     .packs_per_block = of_block,
                                     .num_parts = call.num_parts,
                                     .rule = call.lse_rule(),
                                     .sink = {call.sink.data, call.sink_dtype},
                                     .out = call.out.data,
                                     .out_lse = static_cast<float*>(call.out_lse.data),
                                     .source = source};
  const Grid grid{
      .blocks = call.num_rows(), .blocks_y = (packs - 1) / of_block + 1, .threads = kManyThreads};
  dispatch_floats(call.out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    launch(kernel<merge_many<T, Source>>(), grid, call, parameters);
  });
}

}  // namespace

void launch_many(const PartsCall& call, const AlikeShape& shape) {
  if (call.is_stack) {
    return launch_from(call, shape,
                       Stacked{.data = call.part(0).output.data,
                               .lse = static_cast<const float*>(call.part(0).lse.data),
                               .output_step = static_cast<uint64_t>(call.stack_output_stride *
                                                                    size_of(call.out_dtype)),
                               .lse_step = static_cast<uint64_t>(call.stack_lse_stride)});
  }
  Listed listed;
  for (int k = 0; k < call.num_parts; ++k) {
    listed.data[k] = call.output_data(k);
    listed.lse[k] = static_cast<const float*>(call.lse_data(k));
  }
  launch_from(call, shape, listed);
}

}  // namespace merge_attn_states::cuda
