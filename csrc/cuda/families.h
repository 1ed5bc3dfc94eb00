// The kernel families of the pair: how each cuts a call (shapes.cpp) and its launch, which stands
// in a file of its own. launch.cu asks them in turn.
#pragma once

#include <cstdint>
#include <optional>

#include "../core/merge_call.h"

namespace merge_attn_states::cuda {

inline constexpr int64_t kMaxGridX = 2147483647;  // blocks of one launch

// pair.cu. A tile is `rows` rows along one axis, tokens or heads, at one place of the other axis.
struct PairShape {
  bool tokens_inside;   // a tile is a run of tokens of one head; else of heads of one token
  bool weighs_by_tile;  // one thread a row weighs, through shared memory; else every thread does
  int rows;             // of a tile
  int threads;          // of its block: 16 bytes of a row each
  int64_t blocks;
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

}  // namespace merge_attn_states::cuda
