// The kernel families: how each cuts a call (shapes.cpp) and its launch, which stands in a file of
// its own. launch.cu asks them in turn.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdint>
#include <optional>

#include "../core/merge_call.h"
#include "../core/parts_call.h"
#include "../core/ranks_call.h"

namespace merge_attn_states::cuda {

// Blocks of one launch, along either axis.
inline constexpr int64_t kMaxGridX = 2147483647;
inline constexpr int64_t kMaxGridY = 65535;

// A kernel of few parts has room for a power of two of them, so that it keeps them in registers, or
// for three: a place without a part costs it as much as one with.
constexpr int room_for(int parts) {
  if (parts == 3) return 3;
  return static_cast<int>(std::bit_ceil(static_cast<unsigned>(std::max(parts, 2))));
}

// Calls f<room_for(parts)>(), for at most kMost of them.
template <int kMost, class F>
void with_room_for(int parts, F&& f) {
  static_assert(std::has_single_bit(static_cast<unsigned>(kMost)));
  if constexpr (kMost == 4) {
    if (parts == 3) return f.template operator()<3>();
  }
  if constexpr (kMost > 2) {
    if (parts <= kMost / 2) return with_room_for<kMost / 2>(parts, f);
  }
  f.template operator()<kMost>();
}

// pair.cu. A tile is a run of rows along one axis, the inner one, at one place of the outer one.
struct PairShape {
  bool tokens_inside;   // tokens are the inner axis; else heads
  bool weighs_by_tile;  // one thread a row weighs, through shared memory; else every thread does
  bool inner_first;     // consecutive blocks walk along the inner axis
  int rows;             // of a tile
  int value_threads;    // of its block: 16 bytes of a row each
  int lse_threads;      // beside them, where every thread weighs: a merged LSE each
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

// parts_few.cu, and parts_many.cu for more than kFewParts. Many parts that lie alike.
struct AlikeShape {
  int packs_per_row;
  int rows;         // of a block; of more than kFewParts one
  int threads;      // of a block
  int lse_threads;  // beside them: a merged LSE each
};

// Nothing where the parts differ in more than their addresses or are a pair by LseRule, or rows do
// not consist of aligned packs of 16 bytes, or are out of 32 bits' reach.
std::optional<AlikeShape> alike_shape(const PartsCall& call);
void launch_few(const PartsCall& call, const AlikeShape& shape);
void launch_many(const PartsCall& call, const AlikeShape& shape);

// parts_each.cu and parts_each_backward.cu. Few parts, each with a layout of its own.
struct EachShape {
  int lanes;     // of a row: threads; backward a power of two
  int rows;      // of a block
  bool selects;  // parts have an index or a mask
};

// Nothing where there are more than kEachParts, rows do not consist of aligned packs of eight
// elements or are longer than a block, strides are out of 32 bits' reach, bases are mixed, or
// dtypes are FP8, float64 or more than one (but for float32 of the first part alone).
std::optional<EachShape> each_shape(const PartsCall& call);
void launch_each(const PartsCall& call, const EachShape& shape);

// Nothing, too, where rows want more than 32 lanes, dtypes differ at all, or the outputs' gradients
// are not 16-byte aligned.
std::optional<EachShape> each_backward_shape(const PartsCall& call);
void launch_each_backward(const PartsCall& call, const EachShape& shape);

// peers.cu.
void launch_peers(const RanksCall& call);

// parts_any.cu, backward.cu.
struct AnyShape {
  int rows;      // of a block
  int elements;  // read at a time; 1: any layout
};

// Takes every call of many parts.
AnyShape any_shape(const PartsCall& call);
void launch_any(const PartsCall& call, const AnyShape& shape);

// Takes every merge's gradients.
AnyShape backward_shape(const PartsCall& call);
void launch_backward(const PartsCall& call, const AnyShape& shape);

}  // namespace merge_attn_states::cuda
