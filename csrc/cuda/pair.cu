// The vectorized kernel: 16-byte packs, one a thread, in tiles of tokens x heads.
//
// A block loads its LSEs and its packs, computes each row's weights once into shared memory, meets
// at one barrier, then scales and stores. In place is safe for every head size: all LSE reads of a
// row precede the barrier, no other block touches the row, and a pack is read and written by one
// thread. Nothing is __restrict__, and nothing is read through the non-coherent path.
//
// What a block does before its first load is what it takes too long for: every address is computed
// before the wait for the kernel before, and the four loads stand together (docs/design.md).
#include "../core/merge_call.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"

namespace merge_attn_states::cuda {
namespace {

// What a thread must know of its tile, computed on the host. Tokens and heads are 32-bit here: the
// product of a 32-bit index and a 64-bit stride takes two instructions, of two 64-bit numbers four.
struct Tiles {
  FastDivision across;  // tiles along the axis that blocks walk first
  uint32_t row_factor;  // ceil(2^kRowShift / packs_per_row)
  uint32_t packs_per_row;
  uint32_t rows;         // of a tile
  uint32_t rows_a_pass;  // the rows that the threads' first packs fill, and their second
  uint32_t tokens_a_pass;
  uint32_t token_bits;
  uint32_t head_bits;
  uint32_t token_mask;
  uint32_t head_mask;
  uint32_t num_tokens;
  uint32_t num_heads;
  uint32_t num_tokens_with_context;
  uint32_t num_tokens_with_packs;  // in place, past the context count, a row is what it becomes
  uint32_t num_tokens_in_tiles;    // further tokens have an LSE to be copied and nothing else
  bool tokens_first;
};

constexpr int kRowShift = 20;  // exact while thread * packs_per_row < 2^20
static_assert(kMaxThreads * kMaxThreads <= 1 << kRowShift);

// Elements in the 16 bytes of an input's pack; the output's pack has as many.
template <class In>
inline constexpr int kPackElements = 16 / sizeof(In);

template <class Strided>
__device__ int64_t offset_of(const Strided& operand, uint32_t token, uint32_t head) {
  return token * operand.token_stride + head * operand.head_stride;
}

// kPlain: one offset serves all three [N, H, D] operands, and blocks walk along the heads first.
// kPacks: of a thread; the second lies half a tile's tokens further.
// kLoops: a row may have more packs than the block threads, and is then a tile of its own.
template <class In, class Out, bool kPlain, int kPacks, bool kLoops>
__global__ void __launch_bounds__(kMaxThreads)
    merge_tiles(const __grid_constant__ MergeCall call, const __grid_constant__ Tiles tiles) {
  constexpr int kElements = kPackElements<In>;
  using InPack = Pack<In, kElements>;
  // Where the merged LSE goes is computed behind the loads, while they are under way: 16x16x128
  // warm 1.00 us instead of 1.20, 16x128x512 1.81 and 1.87. An FP8 output, whose packs take more
  // instructions, loses by it (2048x16x128 warm 5.2 us instead of 4.9), and so did two packs a
  // thread (1024x16x192 3.76 and 3.47): they do so after the packs (H100, 2026-11-26).
  constexpr bool kPlacesLseFirst = kPacks == 1 && std::is_same_v<In, Out>;
  __shared__ Weights<float> weights[kMaxThreads];

  const uint32_t slow = tiles.across.quotient(blockIdx.x);
  const uint32_t fast = blockIdx.x - slow * tiles.across.divisor;
  const bool tokens_first = !kPlain && tiles.tokens_first;
  const uint32_t first_token = (tokens_first ? fast : slow) << tiles.token_bits;
  const uint32_t first_head = (tokens_first ? slow : fast) << tiles.head_bits;

  // Packs: the heads of a token one after the other.
  const uint32_t row = threadIdx.x * tiles.row_factor >> kRowShift;
  const uint32_t token = first_token + (row >> tiles.head_bits);
  const uint32_t head = first_head + (row & tiles.head_mask);
  const uint32_t column = (threadIdx.x - row * tiles.packs_per_row) * kElements;
  const int64_t prefix_offset = offset_of(call.parts.prefix.output, token, head) + column;
  const auto offset = [&](const Rows& operand) {
    return kPlain ? prefix_offset : offset_of(operand, token, head) + column;
  };
  const In* prefix_output = static_cast<const In*>(call.parts.prefix.output.data) + prefix_offset;
  const In* suffix_output =
      static_cast<const In*>(call.parts.suffix.output.data) + offset(call.parts.suffix.output);
  compute_now(prefix_output, suffix_output);
  const bool inside = row < tiles.rows_a_pass && head < tiles.num_heads;
  const auto token_of = [&](int k) { return token + k * tiles.tokens_a_pass; };
  const auto has_pack = [&](int k) { return inside && token_of(k) < tiles.num_tokens_with_packs; };
  const auto merges = [&](int k) { return token_of(k) < tiles.num_tokens_with_context; };
  const auto further = [&](int k, const Rows& operand) {
    return k * tiles.tokens_a_pass * operand.token_stride;
  };

  // LSEs: the first threads weigh a row each, along the tokens, in which LSEs are contiguous.
  bool weighs = threadIdx.x < tiles.rows, weighs_prefix = false;
  uint32_t lse_token = 0, lse_head = 0;
  const float *prefix_lse = nullptr, *suffix_lse = nullptr;
  if (weighs) {
    lse_token = first_token + (threadIdx.x & tiles.token_mask);
    lse_head = first_head + (threadIdx.x >> tiles.token_bits);
    weighs = lse_token < tiles.num_tokens && lse_head < tiles.num_heads;
    weighs_prefix = weighs && lse_token < tiles.num_tokens_with_context;
    prefix_lse = static_cast<const float*>(call.parts.prefix.lse.data) +
                 offset_of(call.parts.prefix.lse, lse_token, lse_head);
    suffix_lse = static_cast<const float*>(call.parts.suffix.lse.data) +
                 offset_of(call.parts.suffix.lse, lse_token, lse_head);
  }

  wait_for_previous();
  launch_next();
  float prefix_lse_value = 0, suffix_lse_value = 0;
  if (weighs) suffix_lse_value = load_global(suffix_lse);
  if (weighs_prefix) prefix_lse_value = load_global(prefix_lse);
  InPack prefix[kPacks], suffix[kPacks];
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (has_pack(k)) suffix[k] = InPack::load(suffix_output + further(k, call.parts.suffix.output));
    if (has_pack(k) && merges(k)) {
      prefix[k] = InPack::load(prefix_output + further(k, call.parts.prefix.output));
    }
  }
  float* output_lse = nullptr;
  if constexpr (kPlacesLseFirst) {
    if (weighs && call.merged.lse.data != nullptr) {
      output_lse = static_cast<float*>(call.merged.lse.data) +
                   offset_of(call.merged.lse, lse_token, lse_head);
    }
    compute_now(output_lse);
  }
  const Scale scale = Scale::of<Out>(call.rule.output_scale);

  MergedLse<ScalarMath<float>, float> merged;
  if (weighs) {
    merged = weigh(weighs_prefix, prefix_lse_value, suffix_lse_value);
    weights[(threadIdx.x & tiles.token_mask) << tiles.head_bits | threadIdx.x >> tiles.token_bits] =
        merged.weights;
  }
  __syncthreads();

  Out* output = static_cast<Out*>(call.merged.output.data) + offset(call.merged.output);
#pragma unroll
  for (int k = 0; k < kPacks; ++k) {
    if (!has_pack(k)) break;
    merge_pack<In, Out, kElements>(weights[row + k * tiles.rows_a_pass], scale, prefix[k],
                                   suffix[k])
        .store(output + further(k, call.merged.output));
  }
  if constexpr (kLoops) {
    const int64_t step = int64_t{blockDim.x} * kElements;
    for (int64_t i = step; has_pack(0) && column + i < call.geometry.head_size; i += step) {
      suffix[0] = InPack::load(suffix_output + i);
      if (merges(0)) prefix[0] = InPack::load(prefix_output + i);
      merge_pack<In, Out, kElements>(weights[row], scale, prefix[0], suffix[0]).store(output + i);
    }
  }
  // After the packs: in front of the barrier its logarithm would keep every thread waiting.
  if constexpr (kPlacesLseFirst) {
    if (output_lse == nullptr) return;
    store_global(output_lse, merged.lse());
  } else {
    if (!weighs) return;
    store_lse(call.merged.lse, lse_token, lse_head, merged);
  }
  const uint32_t stride = tiles.num_tokens_in_tiles;
  for (uint32_t at = lse_token + stride; at < tiles.num_tokens; at += stride) {
    store_lse(call.merged.lse, at, lse_head,
              take_suffix(*lse_of<float>(call.parts.suffix.lse, at, lse_head)));
  }
}

// An FP8 output has three kernels, any other four: each costs the compiler a second an
// architecture.
template <class In, class Out>
auto kernel_for(const MergeCall& call, const Tile& tile) {
  constexpr bool kConverts = !std::is_same_v<In, Out>;
  if (packs_per_row(call) > tile.threads) return merge_tiles<In, Out, false, 1, true>;
  if (!is_plain(call, tile)) return merge_tiles<In, Out, false, 1, false>;
  if constexpr (!kConverts) {
    if (tile.packs_a_thread == 2) return merge_tiles<In, Out, true, 2, false>;
  }
  return merge_tiles<In, Out, true, 1, false>;
}

}  // namespace

void launch_vectorized(const MergeCall& call, const Tile& tile, bool overlaps_previous) {
  const auto u32 = [](int64_t value) { return static_cast<uint32_t>(value); };
  const int64_t packs = packs_per_row(call);
  const int64_t tokens =
      call.keeps_suffix_rows() ? call.rule.num_tokens_with_context : call.geometry.num_tokens;
  const int64_t token_tiles = tile.token_tiles(std::max<int64_t>(1, tokens));
  const int64_t head_tiles = tile.head_tiles(call.geometry.num_heads);
  const Tiles tiles{.across = FastDivision(u32(tile.tokens_first ? token_tiles : head_tiles)),
                    .row_factor = u32(((1 << kRowShift) + packs - 1) / packs),
                    .packs_per_row = u32(packs),
                    .rows = u32(tile.rows()),
                    .rows_a_pass = u32(tile.rows() / tile.packs_a_thread),
                    .tokens_a_pass = (1u << tile.token_bits) / tile.packs_a_thread,
                    .token_bits = u32(tile.token_bits),
                    .head_bits = u32(tile.head_bits),
                    .token_mask = (1u << tile.token_bits) - 1,
                    .head_mask = (1u << tile.head_bits) - 1,
                    .num_tokens = u32(call.geometry.num_tokens),
                    .num_heads = u32(call.geometry.num_heads),
                    .num_tokens_with_context = u32(call.rule.num_tokens_with_context),
                    .num_tokens_with_packs = u32(tokens),
                    .num_tokens_in_tiles = u32(token_tiles << tile.token_bits),
                    .tokens_first = tile.tokens_first};
  const Grid grid{.blocks = token_tiles * head_tiles,
                  .threads = tile.threads,
                  .overlaps_previous = overlaps_previous};
  dispatch_dtypes(call.input_dtype, call.output_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    if constexpr (kIsFp8<In> || std::is_same_v<In, double>) {
      throw std::logic_error("merge_attn_states: not a vectorized dtype");
    } else {
      launch(kernel_for<In, Out>(call, tile), grid, call, call, tiles);
    }
  });
}

}  // namespace merge_attn_states::cuda
