// Which tile the vectorized kernel takes and how many rows the generic one: every measured number
// of the CUDA side but those that kernels are compiled for (tile.h), and nothing else.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>

#include "tile.h"

namespace merge_attn_states::cuda {

// Every figure: bfloat16 where no other dtype stands, microseconds warm / cold on an H100,
// 2026-11-26, all alternatives in turn in one process (benchmarks/timing.py). An H200 was last
// asked on 2026-11-24, with an older kernel: docs/benchmarks.md says where it differs.

// The packs that an H100's or H200's 132 multiprocessors hold at a time, one a thread.
inline constexpr int64_t kResidentPacks = 132 * 2048;

// Up to this all blocks start at once, and what binds is the launch. 128, 256 and 512 threads; the
// triad: 16x16x128 1.00, 1.18, 1.34; 1.32. 64x16x128 1.23 / 1.67, 1.28 / 1.69, 1.36 / 1.72; 1.39 /
// 2.08. 128x16x128 1.33, 1.41, 1.50; 1.45. 256x16x128 1.43 / 2.38, 1.58 / 2.40, 1.63 / 2.45; 1.62 /
// 2.85. 512x16x128 1.80 / 3.52, 2.05 / 3.54, 2.01 / 3.58; 1.88 / 3.86. 640x16x128 2.06, 2.28, 2.21;
// 2.15. 768x16x128 2.45, 2.46, 2.33; 2.33. 64 threads: 64x16x128 1.14, but 256x16x128 1.88.
inline constexpr int64_t kSmallPacks = kResidentPacks * 6 / 10;
inline constexpr int kSmallThreads = 128;

// An FP8 output's packs take more instructions: 256x16x128 with 128, 256 and 512 threads 1.85 /
// 2.52, 1.68 / 2.56, 1.70 / 2.58; the triad 1.60 / 2.71.
inline constexpr int kSmallFp8Threads = 256;

// Beyond: 512 threads. 8192x16x128 cold 35.00, of 256 threads 35.12; 1024x16x128 2.59 / 5.62, of
// 256 2.61 / 5.69, of 128 3.14 / 5.80. Rows of 6, 10, 12, ... packs fill 288 to 448 threads of it:
// 4096x32x96 cold 26.82, of 256 threads 27.04; 2048x32x96 9.24 / 14.19 and 9.29 / 14.32.
inline constexpr int kThreads = 512;
inline constexpr int kThreadsOfOddRows = 448;

// 256 for more than one wave of blocks that may still be warm (40 MB), and 512: 2048x16x128 4.07 /
// 9.96 and 4.19 / 9.90, 2048x32x64 4.27 / 10.05 and 4.45 / 10.12, 1024x16x256 4.00 / 9.85 and
// 4.15 / 9.85, 512x16x512 4.03 / 9.85 and 4.21 / 9.80; but float32 1024x16x128 4.02 / 9.80 and
// 3.85 / 9.77.
inline constexpr int64_t kWarmPacks = 40'000'000 / 48;
inline constexpr int kWarmThreads = 256;

// Between one and one and a half times what is resident, the second wave of blocks would be half
// empty: two packs a thread make it one wave. Two packs, one, the triad: 2048x16x96 3.49 / 7.81,
// 3.61 / 7.94, 3.71 / 8.19; 1024x16x192 3.51 / 7.70, 3.61 / 7.84, 3.70 / 8.12; 1500x16x128 3.39 /
// 7.53, 3.59 / 7.76, 3.64 / 8.00; near one wave, where it is as good without, 1200x16x128 3.17 /
// 6.44, 3.14 / 6.46, 3.26 / 6.70. An H200 was slower cold (0.96 of the triad), but such sizes are
// warm in serving.
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
// lies together. Of the triad, cold (2026-11-24, an older kernel): 8192x32x32 four heads 1.00, one
// 0.96 (H100), D = 48 and 96 four 1.00, one 0.99 and less (H200); D = 64 and 128 want none.
constexpr int head_bits_of_rows(int64_t packs_per_row) {
  if (is_power_of_two(packs_per_row)) return packs_per_row >= 8 ? 0 : 4 - bits_below(packs_per_row);
  return packs_per_row < 16 ? 2 : 1;
}

inline Tile choose_tile(const MergeCall& call, int64_t packs_per_row) {
  // As many packs as there are: no such call would fit a GPU, but a count must not overflow.
  const int64_t rows = call.geometry.num_tokens * call.geometry.num_heads;
  const int64_t packs = rows > kTwoPackLimit ? rows : rows * packs_per_row;
  const bool power_of_two = is_power_of_two(packs_per_row);
  const bool small = packs <= kSmallPacks;
  const bool converts = call.input_dtype != call.output_dtype;

  // Consecutive blocks walk along the axis of the smaller stride: [H, N, D] storage 1.00 of the
  // triad instead of 0.97 (cold, H100 and H200, 2026-11-24).
  Tile tile{
      .packs_a_thread = 1,
      .tokens_first = call.geometry.num_tokens > 1 &&
                      call.parts.prefix.output.token_stride < call.parts.prefix.output.head_stride};
  // Each row is weighed by a thread of its own, so that there are no more rows than threads.
  const bool allows_two = packs_per_row > 1 && packs_per_row <= kTwoPackThreads &&
                          call.geometry.num_tokens > 1 && !converts;
  if (packs > kResidentPacks && packs <= kTwoPackLimit && allows_two && is_plain(call, tile)) {
    tile.packs_a_thread = 2;
  }
  const bool waves_of_warm_packs = packs > kTwoPackLimit && packs <= kWarmPacks;
  const int threads = small && converts          ? kSmallFp8Threads
                      : small                    ? kSmallThreads
                      : tile.packs_a_thread == 2 ? kTwoPackThreads
                      : !power_of_two            ? kThreadsOfOddRows
                      : waves_of_warm_packs      ? kWarmThreads
                                                 : kThreads;
  const int row_bits = bits_below(std::max<int64_t>(1, threads / packs_per_row)) +
                       (tile.packs_a_thread == 2 ? 1 : 0);

  // LSEs are read along the axis in which they are contiguous: row by row each costs a sector of 32
  // bytes. Where that axis is shorter than the tile, the other one fills it.
  const bool heads_first =
      call.parts.suffix.lse.head_stride == 1 && call.parts.suffix.lse.token_stride != 1;
  const int token_limit = bits_covering(call.geometry.num_tokens),
            head_limit = bits_covering(call.geometry.num_heads);
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
// and rows enough for one round of every thread. 8192x32x128 e4m3 cold: 64 rows, 8192 elements,
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

inline GenericShape choose_generic(const MergeCall& call, bool packs) {
  const int64_t elements = packs ? kGenericPackBytes / size_of(call.input_dtype) : 1;
  const int64_t wanted = std::max(kGenericElements, kGenericThreads * kGenericUnroll * elements);
  const int64_t num_rows = call.geometry.num_tokens * call.geometry.num_heads;
  const int64_t most = std::clamp<int64_t>(num_rows / kGenericBlocks, 1, kGenericMaxRows);
  const int64_t rows =
      std::clamp<int64_t>(wanted / std::max<int64_t>(1, call.geometry.head_size), 1, most);
  return {.rows = static_cast<int32_t>(rows), .pack_elements = static_cast<int32_t>(elements)};
}

}  // namespace merge_attn_states::cuda
