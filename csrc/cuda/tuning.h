// Which tile the vectorized kernel takes and how many rows the generic one: every measured number
// of the CUDA side but those that kernels are compiled for (tile.h), and nothing else.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "tile.h"

namespace merge_attn_states::cuda {

// Every figure: bfloat16, our bytes a second over the triad's, warm / cold, H100 (a) or H200 (b),
// benchmarks/tune.cu, 2026-11-24 where no other day stands. Beside each its alternative. All are
// older than the merged LSE of log_sum_exp.h, unless it is named.

// The packs that an H100's or H200's 132 multiprocessors hold at a time, one a thread.
inline constexpr int64_t kResidentPacks = 132 * 2048;

// Up to this all blocks start at once, and what binds is the launch: 256 threads, and the next
// kernel's launch begun behind the loads. 256x16x128 (b) 1.00 / 1.07, begun behind the weights
// 0.97 / 0.95; 16x16x128 (b) 1.02 / 1.11. Larger, warm (a, 2026-11-25): 512x16x128 0.905
// and 0.87, 768x16x128 0.89 and 0.91.
inline constexpr int64_t kSmallPacks = kResidentPacks * 6 / 10;
inline constexpr int kSmallThreads = 256;

// With a block of 256 threads or less a multiprocessor, 128 threads: (b) 16x16x128 1.12 / 1.12
// and 1.02 / 1.11 of 256 threads, 64x16x128 1.20 / 1.10 and 1.06 / 1.11, 128x16x128 1.10 / 1.09
// and 1.06 / 1.07. But 256x16x128 0.82 / 1.07 and 1.00 / 1.07. With that LSE, (a), 2026-11-25,
// warm, 128, 256 and 512 threads: 128x16x128 1.02, 0.97, 0.98; 256x16x128 1.00, 0.99, 0.91;
// 512x16x128 0.90, 0.905, 0.88.
inline constexpr int64_t kTinyPacks = 128 * 256;
inline constexpr int kTinyThreads = 128;

// Beyond: 512 threads. 1024x16x128 (b) 1.00 / 0.99, of 256 threads 0.89 / 0.98; 512x16x128 float32
// (a) 1.04 / 1.00 and 0.97 / 0.99. Rows of 6, 10, 12, ... packs fill 288 to 448 threads of it.
inline constexpr int kThreads = 512;
inline constexpr int kThreadsOfOddRows = 448;

// 256 for more than one wave of blocks that may still be warm (40 MB), 2026-11-25: 2048x16x128 (a)
// on two cards 1.035 / 0.99 and 1.00 of 256 threads, 1.02 / 1.00 and 0.95 of 512; warm on the
// second card 2048x32x64 0.98 and 0.95, 1024x16x256 0.99 and 0.95, 512x16x512 0.98 and 0.94. In
// 512x16x512 (b) 0.94 / 0.98 and 0.93 / 1.005.
inline constexpr int64_t kWarmPacks = 40'000'000 / 48;
inline constexpr int kWarmThreads = 256;

// Between one and one and a half times what is resident, the second wave of blocks would be half
// empty: two packs a thread make it one wave. 19 MB (b): D = 96 1.01 / 0.96 instead of 0.90 / 1.00,
// D = 192 1.00 / 0.96 for 0.89 / 0.99, D = 128 0.99 / 0.97 for 0.89 / 1.00. Such sizes are warm in
// serving.
inline constexpr int64_t kTwoPackLimit = kResidentPacks * 3 / 2;
inline constexpr int kTwoPackThreads = 256;

constexpr bool is_power_of_two(int64_t value) {
  return std::has_single_bit(static_cast<uint64_t>(value));
}
constexpr int bits_below(int64_t value) {  // floor(log2(value)), value > 0
  return std::bit_width(static_cast<uint64_t>(value)) - 1;
}
constexpr int bits_covering(int64_t value) {  // ceil(log2(value)), value > 0
  return std::bit_width(static_cast<uint64_t>(value - 1));
}

// Heads beside each other in a tile, as bits: short rows want some, so that what is read together
// lies together. 8192x32x32, cold (a): four heads 1.00, one 0.96. D = 48 and 96, cold (b): four
// 1.00, one 0.99 and less; D = 64 and 128 want none.
constexpr int head_bits_of_rows(int64_t packs_per_row) {
  if (is_power_of_two(packs_per_row)) return packs_per_row >= 8 ? 0 : 4 - bits_below(packs_per_row);
  return packs_per_row < 16 ? 2 : 1;
}

inline Tile choose_tile(const MergeArgs& args, int64_t packs_per_row) {
  // As many packs as there are: no such call would fit a GPU, but a count must not overflow.
  const int64_t rows = args.num_tokens * args.num_heads;
  const int64_t packs = rows > kTwoPackLimit ? rows : rows * packs_per_row;
  const bool power_of_two = is_power_of_two(packs_per_row);
  const bool small = packs <= kSmallPacks;

  // Consecutive blocks walk along the axis of the smaller stride: [H, N, D] storage 1.00 instead of
  // 0.97 (cold, a and b).
  Tile tile{.packs_a_thread = 1,
            .tokens_first = args.num_tokens > 1 &&
                            args.prefix_output.token_stride < args.prefix_output.head_stride,
            .launches_early = small};
  // Each row is weighed by a thread of its own, so that there are no more rows than threads.
  const bool allows_two = packs_per_row > 1 && packs_per_row <= kTwoPackThreads &&
                          args.num_tokens > 1 && args.input_dtype == args.output_dtype;
  if (packs > kResidentPacks && packs <= kTwoPackLimit && allows_two && is_plain(args, tile)) {
    tile.packs_a_thread = 2;
  }
  const bool waves_of_warm_packs = packs > kTwoPackLimit && packs <= kWarmPacks;
  const int threads = packs <= kTinyPacks        ? kTinyThreads
                      : small                    ? kSmallThreads
                      : tile.packs_a_thread == 2 ? kTwoPackThreads
                      : !power_of_two            ? kThreadsOfOddRows
                      : waves_of_warm_packs      ? kWarmThreads
                                                 : kThreads;
  const int row_bits = bits_below(std::max<int64_t>(1, threads / packs_per_row)) +
                       (tile.packs_a_thread == 2 ? 1 : 0);

  // LSEs are read along the axis in which they are contiguous: row by row each costs a sector of 32
  // bytes. Where that axis is shorter than the tile, the other one fills it.
  const bool heads_first = args.suffix_lse.head_stride == 1 && args.suffix_lse.token_stride != 1;
  const int token_limit = bits_covering(args.num_tokens),
            head_limit = bits_covering(args.num_heads);
  if (heads_first) {
    tile.head_bits = std::min(row_bits, head_limit);
    tile.token_bits = std::min(row_bits - tile.head_bits, token_limit);
  } else {
    // No fewer than eight tokens beside each other: a sector of LSEs.
    const int wanted_heads = std::clamp(row_bits - 3, 0, head_bits_of_rows(packs_per_row));
    const int heads = tile.packs_a_thread == 2 ? std::min(wanted_heads, 1) : wanted_heads;
    tile.token_bits = std::min(row_bits - heads, token_limit);
    tile.head_bits = std::min(row_bits - tile.token_bits, head_limit);
  }
  if (tile.token_bits == 0) tile.packs_a_thread = 1;
  const int64_t tile_packs = packs_per_row * tile.rows() / tile.packs_a_thread;
  const int64_t whole_warps = (tile_packs + 31) / 32 * 32;
  tile.threads = static_cast<int>(std::min<int64_t>(whole_warps, kMaxThreads));
  return tile;
}

// The generic kernel: 256 threads, packs of 8 bytes where rows allow them (else single elements),
// and rows enough for one round of every thread. 8192x32x128 e4m3 cold (a): 64 rows, 8192 elements,
// 0.82; 32 rows 0.65; packs of 16 bytes and 128 rows 0.90, for which a third kernel a dtype would
// have to take what is aligned to 8. bfloat16 aligned to 8: 4096 elements 0.96, 8192 0.94. All of
// 2026-11-25.
inline constexpr int64_t kGenericElements = 4096;  // wanted of a block, where there are rows enough
// A block for each of an H100's or H200's multiprocessors, before one gets more rows. Microseconds
// cold / warm (H100, 2026-11-25): 16x16x128 e4m3 2.64 / 2.18 instead of 3.73 / 2.97, 128x16x128
// e4m3 2.95 / 2.29 instead of 4.11 / 3.08, 16x16x101 2.56 / 2.09 instead of 6.23 / 4.70, of which a
// part is the launch that overlaps the kernel before. Two blocks: 512x16x128 e4m3 4.01 / 3.38 for
// 4.24 / 3.00; four: 128x16x128 e4m3 4.36 / 3.54.
inline constexpr int64_t kGenericBlocks = 132;

inline GenericShape choose_generic(const MergeArgs& args, bool packs) {
  const int64_t elements = packs ? kGenericPackBytes / size_of(args.input_dtype) : 1;
  const int64_t wanted = std::max(kGenericElements, kGenericThreads * kGenericUnroll * elements);
  const int64_t num_rows = args.num_tokens * args.num_heads;
  const int64_t most = std::clamp<int64_t>(num_rows / kGenericBlocks, 1, kGenericMaxRows);
  const int64_t rows = std::clamp<int64_t>(wanted / std::max<int64_t>(1, args.head_size), 1, most);
  return {.rows = static_cast<int32_t>(rows), .pack_elements = static_cast<int32_t>(elements)};
}

}  // namespace merge_attn_states::cuda
