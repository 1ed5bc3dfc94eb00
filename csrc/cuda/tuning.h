// Which tile the vectorized kernel takes and how many rows the generic one: every measured number
// of the CUDA side, and nothing else.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../merge_args.h"

namespace merge_attn_states::cuda {

// A block of the vectorized kernel takes 2^token_bits tokens x 2^head_bits heads, one 16-byte pack
// a thread.
struct Tile {
  int token_bits;
  int head_bits;
  int threads;

  int rows() const { return 1 << (token_bits + head_bits); }
};

// 256 threads: 16 x 1 at D = 128 gives 1.00 to 1.03 of the triad cold on an H100 and an H200, 0.93
// to 1.05 warm; blocks of 128 drop to 0.6 warm, where launching blocks binds (2026-11).
inline constexpr int kTileThreads = 256;
// Rows whose packs are no power of two: 8 tokens x 4 heads fill 192 to 448 threads without idle
// lanes (D = 48, 80, 96, 112: 1.00 to 1.02 cold on both, 2026-11); 8 x 2 at D = 192.
inline constexpr int kTileThreadsOdd = 448;
// More threads than this for one row are no gain; a wider row loops.
inline constexpr int kMaxThreads = 512;

constexpr int bits_below(int64_t value) {  // floor(log2(value)), value > 0
  int bits = 0;
  while (value >>= 1) ++bits;
  return bits;
}

constexpr int bits_covering(int64_t value) {  // ceil(log2(value)), value > 0
  return value <= 1 ? 0 : bits_below(value - 1) + 1;
}

inline Tile choose_tile(const MergeArgs& args, int64_t packs_per_row) {
  const bool power_of_two = (packs_per_row & (packs_per_row - 1)) == 0;
  const int64_t threads = power_of_two && packs_per_row >= 8 ? kTileThreads : kTileThreadsOdd;
  const int row_bits = bits_below(std::max<int64_t>(1, threads / packs_per_row));

  // LSEs are read along the axis in which they are contiguous: row by row each costs a sector of 32
  // bytes. Where that axis is shorter than the tile, the other one fills it.
  const bool heads_first = args.suffix_lse.head_stride == 1 && args.suffix_lse.token_stride != 1;
  const int token_limit = bits_covering(args.num_tokens),
            head_limit = bits_covering(args.num_heads);
  const int side = power_of_two || row_bits < 2 ? row_bits : row_bits - (row_bits > 4 ? 2 : 1);
  int token_bits, head_bits;
  if (heads_first) {
    head_bits = std::min(row_bits, head_limit);
    token_bits = std::min(row_bits - head_bits, token_limit);
  } else {
    token_bits = std::min(side, token_limit);
    head_bits = std::min(row_bits - token_bits, head_limit);
  }
  const int64_t packs = packs_per_row << (token_bits + head_bits);
  const int64_t whole_warps = (packs + 31) / 32 * 32;
  return {.token_bits = token_bits,
          .head_bits = head_bits,
          .threads = static_cast<int>(std::min<int64_t>(whole_warps, kMaxThreads))};
}

// The generic kernel: 256 threads, packs of 8 bytes where rows allow them (else single elements),
// and rows enough for one round of every thread.
struct GenericShape {
  int32_t rows;           // of a block
  int32_t pack_elements;  // 1: any layout
};

inline constexpr int kGenericThreads = 256;
inline constexpr int64_t kGenericPackBytes = 8;
inline constexpr int64_t kGenericElements = 4096;
inline constexpr int64_t kGenericMaxRows = 64;

inline GenericShape choose_generic(const MergeArgs& args, bool packs) {
  const int64_t rows = std::clamp<int64_t>(kGenericElements / std::max<int64_t>(1, args.head_size),
                                           1, kGenericMaxRows);
  const int64_t elements = packs ? kGenericPackBytes / size_of(args.input_dtype) : 1;
  return {.rows = static_cast<int32_t>(rows), .pack_elements = static_cast<int32_t>(elements)};
}

}  // namespace merge_attn_states::cuda
