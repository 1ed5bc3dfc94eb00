// Which bytes a strided operand touches, and whether two operands touch the same ones.
//
// Knows nothing of dtypes or of the operation. All arithmetic on user-given sizes and strides is
// checked here once; behind it nothing can overflow.
#pragma once

#include <cstdint>
#include <optional>

namespace merge_attn_states {

inline constexpr int kMaxRank = 3;

// The touched bytes are begin + sum_i k_i * strides[i] + [0, run), 0 <= k_i < counts[i]. Dimensions
// that continue each other are one run; directions do not matter, so strides are positive.
struct Footprint {
  uint64_t begin = 0;  // lowest address
  uint64_t end = 0;    // one past the highest; begin == end: touches nothing
  int64_t run = 0;
  int rank = 0;
  bool repeats = false;        // a stride of 0: one element has several indices
  int64_t counts[kMaxRank]{};  // each > 1, strides descending
  int64_t strides[kMaxRank]{};

  bool empty() const { return begin == end; }
};

// Nothing where an address or an extent leaves 64 bits. sizes >= 0, rank <= kMaxRank.
std::optional<Footprint> footprint(const void* data, const int64_t* sizes, const int64_t* strides,
                                   int rank, int64_t element_bytes);

// True where a common byte is proven. Decided exactly for all but contrived strides; what takes
// too long to decide counts as disjoint.
bool overlaps(const Footprint& a, const Footprint& b);

// True where two indices are proven to share a byte.
bool overlaps_itself(const Footprint& a);

}  // namespace merge_attn_states
