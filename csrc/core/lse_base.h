// What a log-sum-exp is the logarithm to, and how LSEs to two different bases are compared.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>

#include "host_device.h"

namespace merge_attn_states {

enum class Base : uint8_t { kE, kTwo };

template <class Acc>
inline constexpr Acc kLn2 = Acc(0.693147180559945309417);

template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE constexpr Acc ln_of(Base base) {
  return base == Base::kTwo ? kLn2<Acc> : Acc(1);
}

// The LSE of one of many parts, in the base that all of a call have, or natural where they differ:
// then in two terms, since ln 2 times a large LSE, once rounded, is too coarse for a difference.
// Infinite: an empty part, also one that the caller declares to be so.
template <class V>
struct PartLse {
  V high;
  V low;
};

// ln 2 in two terms, the first of so few digits that its product with half of a number's is exact.
template <class Acc>
struct SplitLn2;
template <>
struct SplitLn2<float> {
  using Bits = uint32_t;
  static constexpr Bits kUpperDigits = ~Bits{0} << 12;
  static constexpr float kUpper = 0x1.62ep-1f, kLower = 0x1.0bfbe8p-15f;
};
template <>
struct SplitLn2<double> {
  using Bits = uint64_t;
  static constexpr Bits kUpperDigits = ~Bits{0} << 27;
  static constexpr double kUpper = 0x1.62e42fp-1, kLower = 0x1.df473de6af279p-26;
};

// Of a base-2 LSE.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE PartLse<Acc> natural(Acc base_2) {
  using Ln2 = SplitLn2<Acc>;
  typename Ln2::Bits bits;
  memcpy(&bits, &base_2, sizeof(bits));
  bits &= Ln2::kUpperDigits;
  Acc upper;
  memcpy(&upper, &bits, sizeof(upper));
  const Acc lower = base_2 - upper;
  // Infinity and NaN have no lower digits.
  const bool is_number = std::fabs(base_2) <= std::numeric_limits<Acc>::max();
  return {is_number ? upper * Ln2::kUpper : base_2,
          is_number ? upper * Ln2::kLower + lower * kLn2<Acc> : Acc(0)};
}

}  // namespace merge_attn_states
