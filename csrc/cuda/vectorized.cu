// The vectorized kernel: 16-byte packs, one a thread, in tiles of tokens x heads.
//
// A block loads its packs and its LSEs, computes each row's weights once into shared memory, meets
// at one barrier, then scales and stores. In place is safe for every head size: all LSE reads of a
// row precede the barrier, no other block touches the row, and a pack is read and written by one
// thread. Nothing is __restrict__, and nothing is read through the non-coherent path.
#include "../rows.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"

namespace merge_attn_states::cuda {
namespace {

struct TileIndex {
  FastDivision head_tiles;
  FastDivision packs_per_row;
  int32_t token_bits;
  int32_t head_bits;
};

constexpr int kMaxTileRows = kTileThreadsOdd;  // one pack a row at the least

// Elements in the 16 bytes of an input's pack; the output's pack has as many.
template <class In>
inline constexpr int kPackElements = 16 / sizeof(In);

// kPacksPerRow = 0: known at launch only.
template <class In, class Out, int kPacksPerRow>
__global__ void __launch_bounds__(kMaxThreads)
    merge_vectorized(const __grid_constant__ MergeArgs args,
                     const __grid_constant__ TileIndex tile) {
  constexpr int kElements = kPackElements<In>;
  __shared__ Weights<float> weights[kMaxTileRows];
  wait_for_previous();

  const uint32_t token_tile = tile.head_tiles.quotient(blockIdx.x);
  const uint32_t head_tile = blockIdx.x - token_tile * tile.head_tiles.divisor;
  const int64_t first_token = int64_t{token_tile} << tile.token_bits;
  const int64_t first_head = int64_t{head_tile} << tile.head_bits;
  const uint32_t packs_per_row = kPacksPerRow ? kPacksPerRow : tile.packs_per_row.divisor;
  const uint32_t rows = 1u << (tile.token_bits + tile.head_bits);

  // Rows of the tile: the heads of a token one after the other.
  struct Place {
    uint32_t row;
    int64_t token, head, element;
    bool inside, merges;
  };
  const auto place = [&](uint32_t pack) {
    const uint32_t row = kPacksPerRow ? pack / kPacksPerRow : tile.packs_per_row.quotient(pack);
    const int64_t token = first_token + (row >> tile.head_bits);
    const int64_t head = first_head + (row & ((1u << tile.head_bits) - 1));
    return Place{.row = row,
                 .token = token,
                 .head = head,
                 .element = int64_t{pack - row * packs_per_row} * kElements,
                 .inside = row < rows && token < args.num_tokens && head < args.num_heads,
                 .merges = token < args.num_tokens_with_context};
  };
  using InPack = Pack<In, kElements>;
  const auto load = [&](const Rows& operand, const Place& at) {
    return InPack::load(row_of<In>(operand, at.token, at.head) + at.element);
  };

  const Place first = place(threadIdx.x);
  InPack prefix{}, suffix{};
  if (first.inside) {
    suffix = load(args.suffix_output, first);
    if (first.merges) prefix = load(args.prefix_output, first);
  }
  float scale = 1.0f;
  if constexpr (kIsFp8<Out>) scale = *args.output_scale;

  // LSEs along the tokens, in which they are usually contiguous. The first threads weigh a row
  // each; the merged LSE waits until the packs are stored, since its logarithm would keep the
  // others at the barrier.
  const uint32_t token_in_tile = threadIdx.x & ((1u << tile.token_bits) - 1);
  const uint32_t head_in_tile = threadIdx.x >> tile.token_bits;
  const int64_t lse_token = first_token + token_in_tile, lse_head = first_head + head_in_tile;
  const bool weighs =
      threadIdx.x < rows && lse_token < args.num_tokens && lse_head < args.num_heads;
  MergedLse<ScalarMath<float>, float> merged{};
  if (weighs) {
    merged = weigh_row<float>(args, lse_token, lse_head);
    weights[token_in_tile << tile.head_bits | head_in_tile] = merged.weights;
  }
  __syncthreads();

  const auto store = [&](const Place& at, InPack prefix_pack, InPack suffix_pack) {
    const float* scale_or_none = kIsFp8<Out> ? &scale : nullptr;
    merge_pack<In, Out, kElements>(weights[at.row], scale_or_none, prefix_pack, suffix_pack)
        .store(row_of<Out>(args.output, at.token, at.head) + at.element);
  };
  if (first.inside) store(first, prefix, suffix);
  if constexpr (kPacksPerRow == 0) {  // a row wider than the block
    const uint32_t packs = rows * packs_per_row;
    for (uint32_t pack = threadIdx.x + blockDim.x; pack < packs; pack += blockDim.x) {
      const Place at = place(pack);
      if (!at.inside) continue;
      suffix = load(args.suffix_output, at);
      if (at.merges) prefix = load(args.prefix_output, at);
      store(at, prefix, suffix);
    }
  }
  if (weighs) store_lse(args, lse_token, lse_head, merged.lse());
}

using Kernel = void (*)(MergeArgs, TileIndex);

// Head sizes of today's models have their packs known at compile time; FP8 outputs do without.
template <class In, class Out>
Kernel kernel_for(int64_t packs_per_row) {
  if constexpr (std::is_same_v<In, Out>) {
    switch (packs_per_row) {
      case 4:
        return merge_vectorized<In, Out, 4>;
      case 6:
        return merge_vectorized<In, Out, 6>;
      case 8:
        return merge_vectorized<In, Out, 8>;
      case 10:
        return merge_vectorized<In, Out, 10>;
      case 12:
        return merge_vectorized<In, Out, 12>;
      case 14:
        return merge_vectorized<In, Out, 14>;
      case 16:
        return merge_vectorized<In, Out, 16>;
      case 24:
        return merge_vectorized<In, Out, 24>;
      case 32:
        return merge_vectorized<In, Out, 32>;
      case 64:
        return merge_vectorized<In, Out, 64>;
      case 72:
        return merge_vectorized<In, Out, 72>;
    }
  }
  return merge_vectorized<In, Out, 0>;
}

}  // namespace

void launch_vectorized(const MergeArgs& args, const Tile& tile, bool overlaps_previous) {
  const auto tiles = [](int64_t count, int bits) { return (count + (1ll << bits) - 1) >> bits; };
  const int64_t head_tiles = tiles(args.num_heads, tile.head_bits);
  const int64_t packs = packs_per_row(args);
  const TileIndex index{.head_tiles = FastDivision(static_cast<uint32_t>(head_tiles)),
                        .packs_per_row = FastDivision(static_cast<uint32_t>(packs)),
                        .token_bits = tile.token_bits,
                        .head_bits = tile.head_bits};
  const Grid grid{.blocks = tiles(args.num_tokens, tile.token_bits) * head_tiles,
                  .threads = tile.threads,
                  .overlaps_previous = overlaps_previous};
  dispatch_dtypes(args.input_dtype, args.output_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    if constexpr (kIsFp8<In> || std::is_same_v<In, double>) {
      throw std::logic_error("merge_attn_states: not a vectorized dtype");
    } else {
      launch(kernel_for<In, Out>(packs), grid, args, args, index);
    }
  });
}

}  // namespace merge_attn_states::cuda
