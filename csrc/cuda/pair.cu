// The pair's kernels for rows of 16-byte packs: a thread reads one pack of each part, scales and
// stores it.
//
//   merge_rows   every thread reads its row's LSEs and weighs for itself, without a barrier: for
//                calls that are over before a barrier pays.
//   merge_tiles  one thread a row weighs, through shared memory: fewer reads and exponentials.
//
// Both take tiles of rows along the axis in which LSEs are contiguous. In place is safe: a row
// belongs to one block, all reads of its LSEs precede the write of the merged one (by the barrier
// of the block, or of the one warp that has the row), and a pack is read and written by one thread.
// Nothing is __restrict__ or read through the non-coherent path.
//
// What a thread does before its first load is the lead of a small call. So strides have 32 bits and
// count packs, no branch stands in front of the loads, and operands that are laid out alike share
// one offset (docs/experiments.md has what each of these costs).
#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

enum Side { kPrefix, kSuffix, kMerged };

// Something along the axis inside a tile and along the other one: sizes, or strides, which count
// packs or, of LSEs, elements.
struct Axes2 {
  uint32_t inner;
  uint32_t outer;
};

// kAlike: the three [N, H, D] operands are laid out alike, and so are the LSEs.
template <bool kAlike>
struct Layout {
  static constexpr int kSides = kAlike ? 1 : 3;
  Axes2 of_rows[kSides];
  Axes2 of_lses[kSides];

  __device__ const Axes2& rows(Side side) const { return of_rows[kAlike ? 0 : side]; }
  __device__ const Axes2& lses(Side side) const { return of_lses[kAlike ? 0 : side]; }
};

struct Tiles {
  FastDivision across;  // tiles along the axis that blocks walk first
  bool inner_first;     // which one that is
  uint32_t num_inner;
  uint32_t rows;  // of a tile
  uint32_t packs_per_row;
  uint32_t row_factor;  // ceil(2^kRowShift / packs_per_row)
  Axes2 with_context;   // rows from there on copy the suffix
};

constexpr int kRowShift = 20;  // exact while thread * packs_per_row < 2^20
static_assert(kMaxThreads * kMaxThreads <= 1 << kRowShift);

template <bool kAlike>
struct PairCall {
  const void* prefix;
  const void* suffix;
  void* merged;
  const float* prefix_lse;
  const float* suffix_lse;
  float* merged_lse;  // null: not asked for
  Layout<kAlike> layout;
  Tiles tiles;
  const float* output_scale;
};

struct Row {
  uint32_t inner;
  uint32_t outer;
  bool exists;
  bool merges;  // else it copies the suffix

  __device__ Row(const Tiles& tiles, uint32_t of_tile, bool inner_first) {
    const uint32_t slow = tiles.across.quotient(blockIdx.x);
    const uint32_t fast = blockIdx.x - slow * tiles.across.divisor;
    inner = (inner_first ? fast : slow) * tiles.rows + of_tile;
    outer = inner_first ? slow : fast;
    exists = of_tile < tiles.rows && inner < tiles.num_inner;
    merges = inner < tiles.with_context.inner && outer < tiles.with_context.outer;
  }

  __device__ uint32_t offset(const Axes2& strides) const {
    return inner * strides.inner + outer * strides.outer;
  }
};

// Elements in the 16 bytes of an input's pack; the output's pack has as many.
template <class In>
inline constexpr int kPackElements = 16 / sizeof(In);

// The pack that a thread has to do with.
struct Place {
  uint32_t row_of_tile;
  uint32_t column;

  __device__ explicit Place(const Tiles& tiles)
      : row_of_tile(threadIdx.x * tiles.row_factor >> kRowShift),
        column(threadIdx.x - row_of_tile * tiles.packs_per_row) {}

  template <class T, int kElements, class Data>
  __device__ T* pack(Data* data, const Row& row, const Axes2& strides) const {
    return static_cast<T*>(data) + uint64_t{row.offset(strides) + column} * kElements;
  }
};

struct LsePair {
  float prefix;
  float suffix;
};

template <class In>
struct PackPair {
  Pack<In, kPackElements<In>> prefix;
  Pack<In, kPackElements<In>> suffix;
};

// A row without a prefix reads its suffix twice, which is sooner than a branch.
template <bool kAlike>
__device__ LsePair load_lses(const PairCall<kAlike>& call, const Row& row) {
  const float* prefix = call.prefix_lse + row.offset(call.layout.lses(kPrefix));
  const float* suffix = call.suffix_lse + row.offset(call.layout.lses(kSuffix));
  return {.prefix = load_global(row.merges ? prefix : suffix), .suffix = load_global(suffix)};
}

template <class In, bool kAlike>
__device__ PackPair<In> load_packs(const PairCall<kAlike>& call, const Row& row,
                                   const Place& place) {
  constexpr int kElements = kPackElements<In>;
  using InPack = Pack<In, kElements>;
  const auto at = [&](const void* data, Side side) {
    return place.pack<const In, kElements>(data, row, call.layout.rows(side));
  };
  const In* prefix = at(call.prefix, kPrefix);
  const In* suffix = at(call.suffix, kSuffix);
  return {.prefix = InPack::load(row.merges ? prefix : suffix), .suffix = InPack::load(suffix)};
}

template <class In, class Out, bool kAlike>
__device__ void store_merged(const PairCall<kAlike>& call, const Row& row, const Place& place,
                             const Weights<float>& weights, const PackPair<In>& packs) {
  constexpr int kElements = kPackElements<In>;
  const Scale scale = Scale::of<Out>(call.output_scale);
  merge_pack<In, Out, kElements>(weights, scale, packs.prefix, packs.suffix)
      .store(place.pack<Out, kElements>(call.merged, row, call.layout.rows(kMerged)));
}

template <bool kAlike>
__device__ void store_lse(const PairCall<kAlike>& call, const Row& row, float lse) {
  if (call.merged_lse == nullptr) return;
  store_global(call.merged_lse + row.offset(call.layout.lses(kMerged)), lse);
}

template <class In, class Out, bool kAlike>
__global__ void __launch_bounds__(kMaxThreads)
    merge_rows(const __grid_constant__ PairCall<kAlike> call) {
  const Place place(call.tiles);
  const Row row(call.tiles, place.row_of_tile, false);
  if (!row.exists) return;
  wait_for_previous();

  const LsePair lses = load_lses(call, row);
  const PackPair<In> packs = load_packs<In>(call, row, place);
  const auto merged = weigh(row.merges, lses.prefix, lses.suffix);
  // Every thread computes it, beside its values: behind them it would be the end of the call.
  const float lse = merged.lse();
  store_merged<In, Out>(call, row, place, merged.weights, packs);
  __syncwarp();  // the row's threads have read the LSE that this one may replace
  if (place.column == 0) store_lse(call, row, lse);
}

template <class In, class Out, bool kAlike>
__global__ void __launch_bounds__(kMaxThreads)
    merge_tiles(const __grid_constant__ PairCall<kAlike> call) {
  __shared__ Weights<float> weights[kMaxThreads];
  const Place place(call.tiles);
  const bool inner_first = call.tiles.inner_first;
  const Row row(call.tiles, place.row_of_tile, inner_first);
  const Row weighed(call.tiles, threadIdx.x, inner_first);
  wait_for_previous();

  LsePair lses;
  PackPair<In> packs;
  if (weighed.exists) lses = load_lses(call, weighed);
  if (row.exists) packs = load_packs<In>(call, row, place);
  MergedLse<ScalarMath<float>, float> merged;
  if (weighed.exists) {
    merged = weigh(weighed.merges, lses.prefix, lses.suffix);
    weights[threadIdx.x] = merged.weights;
  }
  __syncthreads();
  if (row.exists) store_merged<In, Out>(call, row, place, weights[place.row_of_tile], packs);
  // After the packs: in front of the barrier its logarithm would keep every thread waiting.
  if (weighed.exists) store_lse(call, weighed, merged.lse());
}

template <bool kAlike>
PairCall<kAlike> pair_call(const MergeCall& call, const PairShape& shape) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const auto axes = [&](int64_t of_tokens, int64_t of_heads) {
    return shape.tokens_inside ? Axes2{u32(of_tokens), u32(of_heads)}
                               : Axes2{u32(of_heads), u32(of_tokens)};
  };
  const auto& [num_tokens, num_heads, head_size] = call.geometry;
  const int64_t with_context = call.rule.num_tokens_with_context;
  const int64_t elements = 16 / size_of(call.input_dtype), packs = head_size / elements;
  const auto& [prefix, suffix] = call.parts;
  PairCall<kAlike> result{
      .prefix = prefix.output.data,
      .suffix = suffix.output.data,
      .merged = call.merged.output.data,
      .prefix_lse = static_cast<const float*>(prefix.lse.data),
      .suffix_lse = static_cast<const float*>(suffix.lse.data),
      .merged_lse = static_cast<float*>(call.merged.lse.data),
      .layout = {},
      .tiles = {.across =
                    FastDivision(u32(shape.inner_first ? shape.inner_tiles : shape.outer_tiles)),
                .inner_first = shape.inner_first,
                .num_inner = axes(num_tokens, num_heads).inner,
                .rows = u32(shape.rows),
                .packs_per_row = u32(packs),
                .row_factor = u32(((1 << kRowShift) + packs - 1) / packs),
                .with_context = axes(with_context, num_heads)},
      .output_scale = call.rule.output_scale};
  const State* sides[] = {&prefix, &suffix, &call.merged};
  for (int side = 0; side < Layout<kAlike>::kSides; ++side) {
    const auto& [rows, lses] = *sides[side];
    result.layout.of_rows[side] = axes(rows.token_stride / elements, rows.head_stride / elements);
    result.layout.of_lses[side] = axes(lses.token_stride, lses.head_stride);
  }
  return result;
}

bool are_alike(const MergeCall& call) {
  const auto alike = [](const auto& a, const auto& b) {
    return a.token_stride == b.token_stride && a.head_stride == b.head_stride;
  };
  const auto& [prefix, suffix] = call.parts;
  const State& merged = call.merged;
  return alike(prefix.output, suffix.output) && alike(prefix.output, merged.output) &&
         alike(prefix.lse, suffix.lse) &&
         (merged.lse.data == nullptr || alike(prefix.lse, merged.lse));
}

template <bool kAlike>
void launch_with_layout(const MergeCall& call, const PairShape& shape) {
  const Grid grid{.blocks = shape.inner_tiles * shape.outer_tiles, .threads = shape.threads};
  dispatch_dtypes(call.input_dtype, call.output_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    if constexpr (kIsFp8<In> || std::is_same_v<In, double>) {
      throw std::logic_error("merge_attn_states: not a vectorized dtype");
    } else {
      launch(shape.weighs_by_tile ? merge_tiles<In, Out, kAlike> : merge_rows<In, Out, kAlike>,
             grid, call, pair_call<kAlike>(call, shape));
    }
  });
}

}  // namespace

void launch_pair(const MergeCall& call, const PairShape& shape) {
  if (are_alike(call)) {
    launch_with_layout<true>(call, shape);
  } else {
    launch_with_layout<false>(call, shape);
  }
}

}  // namespace merge_attn_states::cuda
