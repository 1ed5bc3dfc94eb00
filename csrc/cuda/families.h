// The kernel families of the pair: how each cuts a call (shapes.cpp) and its launch, which stands
// in a file of its own. launch.cu asks them in turn.
#pragma once

#include <cstdint>
#include <optional>

#include "../core/merge_call.h"

namespace merge_attn_states::cuda {

inline constexpr int64_t kMaxGridX = 2147483647;  // blocks of one launch

// pair.cu. A tile is a run of rows along one axis, the inner one, at one place of the outer one.
struct PairShape {
  bool tokens_inside;   // tokens are the inner axis; else heads
  bool weighs_by_tile;  // one thread a row weighs, through shared memory; else every thread does
  bool inner_first;     // of tiles: consecutive blocks walk along the inner axis
  int rows;             // of a tile
  int threads;          // of its block: 16 bytes of a row each
  int64_t inner_tiles;
  int64_t outer_tiles;
};

// Nothing where rows do not consist of aligned packs of 16 bytes, or are out of 32 bits' reach. The
// capability is the device's: major * 10 + minor.
std::optional<PairShape> pair_shape(const MergeCall& call, int capability);
void launch_pair(const MergeCall& call, const PairShape& shape);

// generic.cu. Takes every call.
struct GenericShape {
  int rows;           // of a block
  int pack_elements;  // read at a time; 1: any layout
};

GenericShape generic_shape(const MergeCall& call);
void launch_generic(const MergeCall& call, const GenericShape& shape);

// further_lses.cu. Copies the LSEs of the tokens without context.
void launch_further_lses(const MergeCall& call);

}  // namespace merge_attn_states::cuda
