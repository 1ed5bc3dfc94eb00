// The two builds of the CPU kernel.
#pragma once

#include "../core/merge_call.h"
#include "../core/parts_call.h"

// Clang has no way to switch an instruction set on for the rest of a file, templates from headers
// included: there the build must say 1 and give kernels_v3.cpp its flags (-mavx2 -mbmi -mbmi2
// -mf16c -mfma), else only the baseline is built.
#ifndef MERGE_ATTN_STATES_HAS_V3
#if defined(__x86_64__) && !defined(__clang__)
#define MERGE_ATTN_STATES_HAS_V3 1
#else
#define MERGE_ATTN_STATES_HAS_V3 0
#endif
#endif

namespace merge_attn_states::cpu {

// LSEs lie along the tokens and rows along the heads. Sixteen floats of an LSE are one cache line;
// row by row instead, an LSE of 2^k tokens puts every head's line into the same few cache sets.
// Heads in plenty keep the rows' memory contiguous (docs/experiments.md has the bandwidths).
inline constexpr int64_t kTileTokens = 16;
inline constexpr int64_t kTileHeads = 128;
inline constexpr int64_t kTileHeadsOfFewTokens = 32;  // one tile of tokens: heads feed the threads

// Heads between the LSEs that are weighed and those that are asked for.
inline constexpr int64_t kHeadsAhead = 8;

// An output of this many bytes is stored past the caches where it may be: with two inputs as large
// it would leave most of them, and a store through them first reads what it overwrites.
inline constexpr int64_t kStreamedBytes = 16 << 20;

MERGE_ATTN_STATES_HOST_DEVICE int64_t tile_heads(const MergeCall& call) {
  return call.geometry.num_tokens > kTileTokens ? kTileHeads : kTileHeadsOfFewTokens;
}

MERGE_ATTN_STATES_HOST_DEVICE int64_t tiles(int64_t count, int64_t size) {
  return (count + size - 1) / size;
}

// Parts, and a sink, times rows across: of so many a tile keeps the weights of sixteen rows.
inline constexpr int64_t kTileParts = kMaxAlikeParts + 1;

// How the rows of many parts are cut. `along` is the dimension in which LSEs lie closest, `across`
// the innermost other one; a tile has extents along these two.
struct PartsTiles {
  struct {
    int along, across;
  } dims;
  int64_t extents[kMaxRowDims];
  int64_t counts[kMaxRowDims];
  bool streams;  // the result may go past the caches
};

// Tiles [begin, end), the tiles of a token range one after the other. `streams`: the result may go
// past the caches.
namespace baseline {
void merge_tiles(const MergeCall& call, bool streams, int64_t begin, int64_t end);
void merge_parts(const PartsCall& call, const PartsTiles& tiles, int64_t begin, int64_t end);
void backward_parts(const PartsCall& call, const PartsTiles& tiles, int64_t begin, int64_t end);
}  // namespace baseline

namespace v3 {  // x86-64-v3: AVX2 and F16C
void merge_tiles(const MergeCall& call, bool streams, int64_t begin, int64_t end);
void merge_parts(const PartsCall& call, const PartsTiles& tiles, int64_t begin, int64_t end);
void backward_parts(const PartsCall& call, const PartsTiles& tiles, int64_t begin, int64_t end);
}  // namespace v3

}  // namespace merge_attn_states::cpu
