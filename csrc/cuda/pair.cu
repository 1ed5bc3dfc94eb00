// The pair's kernels for rows of 16-byte packs: a thread reads one pack of each part, scales and
// stores it.
//
//   merge_rows   every thread reads its row's LSEs and weighs for itself, and further threads, one
//                a row, merge the LSEs: for calls that are over before a barrier pays.
//   merge_tiles  one thread a row weighs, through shared memory: fewer reads and exponentials.
//
// Both take tiles of rows along the axis in which LSEs are contiguous, or along heads where there
// are too few tokens (shapes.cpp). In place is safe: a row belongs to one block, a barrier stands
// between the reads of an LSE and its replacement, and a pack is read and written by one thread.
// Nothing is __restrict__ or read through the non-coherent path.
//
// What a thread does before its first load is the lead of a small call. So strides have 32 bits and
// count packs, the grid says where a tile lies without a division, a row without a prefix costs no
// branch, parameters stand in the order of their use, and calls of the usual kind have kernels that
// ask for nothing else (docs/experiments.md has what each of these costs).
#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

enum class Kind {
  kUsual,  // every row has a prefix; the [N, H, D] operands lie alike, and so do the LSEs
  kAny,
  kKeepsSuffix,  // the output is the suffix: a row without a prefix has its values already
};

enum Side { kPrefix, kSuffix, kMerged };

// Something along the axis inside a tile and along the other one: sizes, or strides, which count
// packs or, of LSEs, elements.
struct PerAxis {
  uint32_t inner;
  uint32_t outer;
};

template <Kind kKind>
struct Layout {
  static constexpr int kSides = kKind == Kind::kUsual ? 1 : 3;
  PerAxis of_rows[kSides];
  PerAxis of_lses[kSides];

  __device__ const PerAxis& rows(Side side) const { return of_rows[kSides == 1 ? 0 : side]; }
  __device__ const PerAxis& lses(Side side) const { return of_lses[kSides == 1 ? 0 : side]; }
};

struct Tiles {
  bool inner_first;  // the grid's x counts tiles along the inner axis, y places of the outer one
  uint32_t num_inner;
  uint32_t rows;  // of a tile
  ThreadDivision packs_per_row;
  PerAxis with_context;    // rows from there on copy the suffix
  uint32_t value_threads;  // merge_rows: threads from there on merge an LSE each
  bool replaces_an_lse;
};

static_assert(ThreadDivision::is_exact(kMaxThreads));

template <Kind kKind>
struct PairCall {
  Tiles tiles;
  Layout<kKind> layout;
  const float* prefix_lse;
  const float* suffix_lse;
  const void* prefix;
  const void* suffix;
  void* merged;
  float* merged_lse;  // null: not asked for
  const float* output_scale;
};

struct Row {
  uint32_t inner;
  uint32_t outer;
  bool exists;
  bool merges;  // else it copies the suffix

  template <Kind kKind>
  __device__ Row(const PairCall<kKind>& call, uint32_t of_tile, bool inner_first) {
    const Tiles& tiles = call.tiles;
    inner = (inner_first ? blockIdx.x : blockIdx.y) * tiles.rows + of_tile;
    outer = inner_first ? blockIdx.y : blockIdx.x;
    exists = of_tile < tiles.rows && inner < tiles.num_inner;
    merges = kKind == Kind::kUsual ||
             (inner < tiles.with_context.inner && outer < tiles.with_context.outer);
  }

  __device__ uint32_t offset(const PerAxis& strides) const {
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
      : row_of_tile(tiles.packs_per_row.quotient(threadIdx.x)),
        column(threadIdx.x - row_of_tile * tiles.packs_per_row.divisor) {}

  template <class T, int kElements, class Data>
  __device__ T* pack(Data* data, const Row& row, const PerAxis& strides) const {
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
template <Kind kKind>
__device__ LsePair load_lses(const PairCall<kKind>& call, const Row& row) {
  const float* prefix = call.prefix_lse + row.offset(call.layout.lses(kPrefix));
  const float* suffix = call.suffix_lse + row.offset(call.layout.lses(kSuffix));
  return {.prefix = load_global(row.merges ? prefix : suffix), .suffix = load_global(suffix)};
}

template <class In, Kind kKind>
__device__ PackPair<In> load_packs(const PairCall<kKind>& call, const Row& row,
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

// Only an FP8 output has a scale, and where the inputs are no FP8 it always has one.
template <class Out, Kind kKind>
__device__ float load_scale(const PairCall<kKind>& call) {
  if constexpr (kIsFp8<Out>) return load_global(call.output_scale);
  return 1.0f;
}

template <class In, class Out, Kind kKind>
__device__ void store_merged(const PairCall<kKind>& call, const Row& row, const Place& place,
                             const Weights<float>& weights, float scale,
                             const PackPair<In>& packs) {
  constexpr int kElements = kPackElements<In>;
  merge_pack<In, Out, kElements>(weights, kIsFp8<Out> ? Scale(scale) : Scale(), packs.prefix,
                                 packs.suffix)
      .store(place.pack<Out, kElements>(call.merged, row, call.layout.rows(kMerged)));
}

template <Kind kKind>
__device__ void store_lse(const PairCall<kKind>& call, const Row& row, float lse) {
  store_global(call.merged_lse + row.offset(call.layout.lses(kMerged)), lse);
}

// Two blocks a multiprocessor are asked for so that registers are plenty: nvcc otherwise saves them
// by loading the packs behind what it computes of the LSEs, a second trip to memory.
template <class In, class Out, Kind kKind>
__global__ void __launch_bounds__(kMaxRowsThreads, 2)
    merge_rows(const __grid_constant__ PairCall<kKind> call) {
  const Place place(call.tiles);
  const bool merges_lse = threadIdx.x >= call.tiles.value_threads;
  const uint32_t of_tile = merges_lse ? threadIdx.x - call.tiles.value_threads : place.row_of_tile;
  const Row row(call, of_tile, false);
  if (!row.exists) return;
  const bool merges_values = !merges_lse && (row.merges || kKind != Kind::kKeepsSuffix);
  wait_for_previous();

  const LsePair lses = load_lses(call, row);
  PackPair<In> packs;
  float scale;
  if (merges_values) {
    packs = load_packs<In>(call, row, place);
    scale = load_scale<Out>(call);
  }
  if (call.tiles.replaces_an_lse) __syncthreads();
  const auto merged = weigh(row.merges, lses.prefix, lses.suffix);
  if (merges_values) store_merged<In, Out>(call, row, place, merged.weights, scale, packs);
  if (merges_lse) store_lse(call, row, merged.lse());
}

template <class In, class Out, Kind kKind>
__global__ void __launch_bounds__(kMaxThreads)
    merge_tiles(const __grid_constant__ PairCall<kKind> call) {
  __shared__ Weights<float> weights[kMaxThreads];
  const Place place(call.tiles);
  const bool inner_first = call.tiles.inner_first;
  const Row row(call, place.row_of_tile, inner_first);
  const Row weighed(call, threadIdx.x, inner_first);
  const bool merges_values = row.exists && (row.merges || kKind != Kind::kKeepsSuffix);
  wait_for_previous();

  LsePair lses;
  PackPair<In> packs;
  float scale;
  if (weighed.exists) lses = load_lses(call, weighed);
  if (merges_values) {
    packs = load_packs<In>(call, row, place);
    scale = load_scale<Out>(call);
  }
  MergedLse<ScalarMath<float>, float> merged;
  if (weighed.exists) {
    merged = weigh(weighed.merges, lses.prefix, lses.suffix);
    weights[threadIdx.x] = merged.weights;
  }
  __syncthreads();
  if (merges_values) {
    store_merged<In, Out>(call, row, place, weights[place.row_of_tile], scale, packs);
  }
  // After the packs: in front of the barrier its logarithm would keep every thread waiting.
  if (weighed.exists && call.merged_lse != nullptr) store_lse(call, weighed, merged.lse());
}

bool replaces_an_lse(const MergeCall& call) {
  const void* merged = call.merged.lse.data;
  return merged != nullptr &&
         (merged == call.parts.prefix.lse.data || merged == call.parts.suffix.lse.data);
}

template <Kind kKind>
PairCall<kKind> pair_call(const MergeCall& call, const PairShape& shape) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const auto axes = [&](int64_t of_tokens, int64_t of_heads) {
    return shape.tokens_inside ? PerAxis{u32(of_tokens), u32(of_heads)}
                               : PerAxis{u32(of_heads), u32(of_tokens)};
  };
  const auto& [num_tokens, num_heads, head_size] = call.geometry;
  const int64_t with_context = call.rule.num_tokens_with_context;
  const int64_t elements = 16 / size_of(call.input_dtype), packs = head_size / elements;
  const auto& [prefix, suffix] = call.parts;
  PairCall<kKind> result{.tiles = {.inner_first = shape.inner_first,
                                   .num_inner = axes(num_tokens, num_heads).inner,
                                   .rows = u32(shape.rows),
                                   .packs_per_row = ThreadDivision(u32(packs)),
                                   .with_context = axes(with_context, num_heads),
                                   .value_threads = u32(shape.value_threads),
                                   .replaces_an_lse = replaces_an_lse(call)},
                         .layout = {},
                         .prefix_lse = static_cast<const float*>(prefix.lse.data),
                         .suffix_lse = static_cast<const float*>(suffix.lse.data),
                         .prefix = prefix.output.data,
                         .suffix = suffix.output.data,
                         .merged = call.merged.output.data,
                         .merged_lse = static_cast<float*>(call.merged.lse.data),
                         .output_scale = call.rule.output_scale};
  const State* sides[] = {&prefix, &suffix, &call.merged};
  for (int side = 0; side < Layout<kKind>::kSides; ++side) {
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

template <Kind kKind>
void launch_kind(const MergeCall& call, const PairShape& shape) {
  const Grid grid{.blocks = shape.inner_first ? shape.inner_tiles : shape.outer_tiles,
                  .blocks_y = shape.inner_first ? shape.outer_tiles : shape.inner_tiles,
                  .threads = shape.value_threads + shape.lse_threads};
  dispatch_dtypes(call.input_dtype, call.output_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    constexpr bool kIsVectorized = !kIsFp8<In> && !std::is_same_v<In, double>;
    constexpr bool kMayBe = kKind != Kind::kKeepsSuffix || std::is_same_v<In, Out>;
    if constexpr (kIsVectorized && kMayBe) {
      launch(shape.weighs_by_tile ? kernel<merge_tiles<In, Out, kKind>>()
                                  : kernel<merge_rows<In, Out, kKind>>(),
             grid, call, pair_call<kKind>(call, shape));
    } else {
      throw std::logic_error("merge_attn_states: not a vectorized dtype");
    }
  });
}

}  // namespace

void launch_pair(const MergeCall& call, const PairShape& shape) {
  if (call.has_rows_to_keep()) {
    launch_kind<Kind::kKeepsSuffix>(call, shape);
  } else if (call.every_row_has_prefix() && are_alike(call)) {
    launch_kind<Kind::kUsual>(call, shape);
  } else {
    launch_kind<Kind::kAny>(call, shape);
  }
}

}  // namespace merge_attn_states::cuda
