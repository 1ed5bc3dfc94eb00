// What a launch is told: how the work is cut. The numbers here are those that the kernels are
// compiled for; which cut serves which shape is for tuning.h.
#pragma once

#include <cstdint>

#include "../core/merge_call.h"

namespace merge_attn_states::cuda {

// Of a block of the vectorized kernel. With 1,024 0.86 to 0.93 of the triad, warm and below 12 MB
// (H100, 2026-11-24). A wider row loops.
inline constexpr int kMaxThreads = 512;

// A block of the vectorized kernel takes 2^token_bits tokens x 2^head_bits heads, one 16-byte pack
// a thread or two.
struct Tile {
  int token_bits;
  int head_bits;
  int threads;
  int packs_a_thread;
  bool tokens_first;  // which axis consecutive blocks walk along

  int64_t rows() const { return int64_t{1} << (token_bits + head_bits); }
  int64_t token_tiles(int64_t tokens) const { return tiles(tokens, token_bits); }
  int64_t head_tiles(int64_t heads) const { return tiles(heads, head_bits); }

 private:
  static int64_t tiles(int64_t count, int bits) { return ((count - 1) >> bits) + 1; }
};

// All three [N, H, D] operands have the same strides, and heads lie closer than tokens.
inline bool is_plain(const MergeCall& call, const Tile& tile) {
  const auto same = [&](const Rows& other) {
    return other.token_stride == call.parts.prefix.output.token_stride &&
           other.head_stride == call.parts.prefix.output.head_stride;
  };
  return !tile.tokens_first && same(call.parts.suffix.output) && same(call.merged.output);
}

// Of the generic kernel, and what half and twice as many would give (microseconds, H100,
// 2026-11-26). Threads, 128, 256 and 512: 8192x32x128 e4m3 cold 39.7, 42.2, 58.3;
// 8192x32x101 85.2, 87.9, 99.7; but 2048x16x100 warm 6.96, 5.78, 5.89, 128x16x101 3.89, 3.06, 2.99.
// Packs of a thread whose loads are in flight together, 2, 4 and 8: 8192x32x128
// e4m3 43.5, 42.2, 62.2; 8192x32x101 90.0, 87.9, 105.5; 2048x16x100 warm 6.27, 5.78, 6.58;
// 512x16x128 e4m3 warm 2.66, 3.02, 2.88.
inline constexpr int kGenericThreads = 256;
inline constexpr int kGenericUnroll = 4;
inline constexpr int64_t kGenericPackBytes = 8;
inline constexpr int64_t kGenericMaxRows = 64;

struct GenericShape {
  int32_t rows;           // of a block
  int32_t pack_elements;  // 1: any layout
};

}  // namespace merge_attn_states::cuda
