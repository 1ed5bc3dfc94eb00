// Which bytes a strided operand touches, and whether two operands touch the same ones.
//
// Knows nothing of dtypes or of the operation. All arithmetic on user-given sizes and strides is
// checked here once, in find_extent(); behind it nothing can overflow. The two quick answers stand
// in this header; nearly every call needs no other, and a search costs more than all other checks.
#pragma once

#include <cstdint>

namespace merge_attn_states {

// Parts, four row dimensions and head_size.
inline constexpr int kMaxRank = 6;

// Addresses [begin, end); begin == end: touches nothing.
struct Extent {
  uint64_t begin = 0;
  uint64_t end = 0;

  bool empty() const { return begin == end; }
  bool overlaps_range(const Extent& other) const { return begin < other.end && other.begin < end; }
};

// From the lowest touched byte to the highest. False where an address or the extent leaves 64 bits.
// sizes >= 0, rank <= kMaxRank.
bool find_checked_extent(const void* data, const int64_t* sizes, const int64_t* strides, int rank,
                         int64_t element_bytes, Extent& result);

inline bool find_extent(const void* data, const int64_t* sizes, const int64_t* strides, int rank,
                        int64_t element_bytes, Extent& result) {
  // Numbers below 2^28, of no sign: six products of two, of 8-byte elements, stay below 2^63. A
  // size of 0 becomes the largest number of all.
  constexpr uint64_t kNeverOverflows = uint64_t{1} << 28;
  static_assert(kMaxRank < 16);
  uint64_t bits = 0, last = 0;
  for (int i = 0; i < rank; ++i) {
    const uint64_t steps = static_cast<uint64_t>(sizes[i]) - 1;
    const uint64_t stride = static_cast<uint64_t>(strides[i]);
    bits |= steps | stride;
    last += steps * stride;
  }
  const uint64_t begin = reinterpret_cast<uintptr_t>(data);
  const uint64_t end = begin + (last + 1) * static_cast<uint64_t>(element_bytes);
  if (bits >= kNeverOverflows || end <= begin) {
    return find_checked_extent(data, sizes, strides, rank, element_bytes, result);
  }
  result = {begin, end};
  return true;
}

// Whether each stride steps over all that the smaller ones reach, as those of tensors and of their
// slices and transposes do: then no two indices share an element. For what has an extent.
bool nests_in_some_order(const int64_t* sizes, const int64_t* strides, int rank);

inline bool nests(const int64_t* sizes, const int64_t* strides, int rank) {
  int64_t reach = 0;  // of the later dimensions, the smaller ones in most tensors
  bool all = true;
  for (int i = rank - 1; i >= 0; --i) {
    if (sizes[i] == 1) continue;
    all &= strides[i] > reach;
    reach += (sizes[i] - 1) * strides[i];
  }
  return all || nests_in_some_order(sizes, strides, rank);
}

// The touched bytes are begin + sum_i k_i * strides[i] + [0, run), 0 <= k_i < counts[i]. Dimensions
// that continue each other are one run; directions do not matter, so strides are positive.
struct Footprint : Extent {
  int64_t run = 0;
  int rank = 0;
  bool repeats = false;        // a stride of 0: one element has several indices
  int64_t counts[kMaxRank]{};  // each > 1, strides descending
  int64_t strides[kMaxRank]{};
};

// Of what has an extent.
Footprint footprint(const Extent& extent, const int64_t* sizes, const int64_t* strides, int rank,
                    int64_t element_bytes);

// Steps of a search: views of a real buffer need a handful, contrived strides may need millions.
// Behind it, operands of no more runs than this are compared run by run; larger ones count as
// disjoint.
inline constexpr int kSearchBudget = 4096;
inline constexpr int64_t kFewRuns = 16384;

// True where a common byte is proven.
bool overlaps(const Footprint& a, const Footprint& b, int budget = kSearchBudget);

// True where two indices are proven to share a byte.
bool overlaps_itself(const Footprint& a, int budget = kSearchBudget);

}  // namespace merge_attn_states
