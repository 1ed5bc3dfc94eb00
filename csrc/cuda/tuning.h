// The GPU's numbers that were chosen by measurement, and nothing else: between ordinary kernels, op
// libraries side by side (docs/benchmarks.md); docs/experiments.md has what others gave.
#pragma once

#include <algorithm>
#include <cstdint>

#include "../core/ranks_call.h"

namespace merge_attn_states::cuda {

struct Tuning {
  int capability;  // major * 10 + minor; 0: every other device
  // Up to so many packs merge_rows, in blocks of so many threads; beyond it merge_tiles.
  int64_t rows_packs;
  int rows_threads;
  int tiles_threads;
  // From so many packs on, of which most then come from DRAM, merge_tiles in larger blocks.
  int64_t dram_packs;
  int dram_threads;
};

inline constexpr Tuning kTunings[] = {
    {.capability = 90,  // H100, 2026-11-27
     .rows_packs = 192 * 1024,
     .rows_threads = 256,
     .tiles_threads = 256,
     .dram_packs = 1 << 19,
     .dram_threads = 512},
    {.capability = 0,
     .rows_packs = 192 * 1024,
     .rows_threads = 256,
     .tiles_threads = 256,
     .dram_packs = 1 << 19,
     .dram_threads = 512},
};

inline const Tuning& tuning_of(int capability) {
  return *std::ranges::find_if(kTunings, [=](const Tuning& tuning) {
    return tuning.capability == capability || tuning.capability == 0;
  });
}

// A block of 1,024 threads leaves a multiprocessor half empty while it ends.
inline constexpr int kMaxThreads = 512;
// merge_rows has a thread more for each row, in whole warps.
inline constexpr int kMaxRowsThreads = kMaxThreads + 32;
static_assert(std::ranges::all_of(kTunings, [](const Tuning& tuning) {
  return 2 * tuning.rows_threads <= kMaxRowsThreads;  // rows of one pack
}));

// Tiles lie along tokens where these fill so many of them, else along heads: the rows of a few
// tokens lie too far apart in memory.
inline constexpr int kFewestTokenTiles = 2;

// The generic kernel: threads of a block, packs of a thread whose loads are under way together,
// elements wanted of a block, and the blocks that are wanted before one gets more rows.
inline constexpr int kGenericThreads = 256;
inline constexpr int kGenericUnroll = 4;
inline constexpr int64_t kGenericPackBytes = 8;
inline constexpr int64_t kGenericMaxRows = 64;
inline constexpr int64_t kGenericElements = 4096;
inline constexpr int64_t kGenericBlocks = 132;

// Many parts that lie alike: up to so many are listed in a small block of parameters and held in
// registers; threads of a block; packs of the longest row, and so the most threads of values.
inline constexpr int kFewParts = 16;
inline constexpr int kFewThreads = 128;
inline constexpr int kFewMostPacks = 256;
inline constexpr int kMaxFewThreads = kFewMostPacks + 32;
// Beyond them: threads of a block, which is one row's, and packs of that row at a time.
inline constexpr int kManyThreads = 256;
inline constexpr int kManyPacks = 8;
// Few parts of any kind: as many parts; threads of a block; elements that a thread of it has of
// each part: twice as many share what there is to compute of a row with an index.
inline constexpr int kEachParts = 8;
inline constexpr int kEachThreads = 256;
static_assert(kEachThreads % 32 == 0);
constexpr int each_elements(int most, bool selects) { return most <= 4 && selects ? 16 : 8; }

// A merge across ranks (core/ranks_call.h); the most threads of its blocks, and how many of these a
// multiprocessor holds at once: calls of two objects on two streams wait for their own ranks only.
inline constexpr PeerSizes kPeerSizes{.line_threads = 128,
                                      .most_line_bytes = 512 << 10,
                                      .chunk_threads = 512,
                                      .chunk_packs = 4,
                                      .blocks = 128,
                                      .least_read_bytes = 3 << 19,
                                      .most_read_bytes = 32 << 20};
inline constexpr int kPeerThreads = 512;
inline constexpr int kPeerBlocksAMultiprocessor = 2;
static_assert(std::min(kPeerSizes.line_threads, kPeerSizes.chunk_threads) >= kMaxPeers);

// Parts of any kind: threads of a block, weights that it keeps, elements wanted of it.
inline constexpr int kAnyThreads = 256;
inline constexpr int kAnyWeights = 1024;
inline constexpr int64_t kAnyElements = 2048;
inline constexpr int kAnyPack = 8;
// Of gradients of more parts, or longer rows, a warp takes a row: 32 packs are one of 128 elements.
inline constexpr int kBackwardPack = 4;

}  // namespace merge_attn_states::cuda
