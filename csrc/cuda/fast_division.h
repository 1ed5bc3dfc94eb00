// Exact division by a divisor known at launch, in one multiplication: of numbers below 2^31, and of
// a block's threads.
#pragma once

#include <bit>
#include <cstdint>

#include "../core/host_device.h"

namespace merge_attn_states::cuda {

struct FastDivision {
  uint32_t divisor;
  uint32_t factor;  // ceil(2^shift / divisor)
  uint32_t shift;

  FastDivision() = default;
  // by <= 2^31. A power of two has the factor 2^31; any other lies a good deal below 2^32.
  explicit FastDivision(uint32_t by) : divisor(by), shift(31 + std::bit_width(by - 1)) {
    factor = static_cast<uint32_t>(((uint64_t{1} << shift) + by - 1) / by);
  }

  // factor - 2^shift / divisor < 1 and value < 2^31 <= 2^shift / divisor: the error stays below
  // 1 / divisor, too little to pass the next whole number.
  MERGE_ATTN_STATES_HOST_DEVICE uint32_t quotient(uint32_t value) const {
    return static_cast<uint32_t>(uint64_t{value} * factor >> shift);
  }
};

// Of small numbers, in 32 bits: exact while number * divisor < 2^kShift.
struct ThreadDivision {
  static constexpr int kShift = 20;

  uint32_t divisor;
  uint32_t factor;  // ceil(2^kShift / divisor)

  explicit ThreadDivision(uint32_t by) : divisor(by), factor(((1u << kShift) + by - 1) / by) {}

  MERGE_ATTN_STATES_HOST_DEVICE uint32_t quotient(uint32_t number) const {
    return number * factor >> kShift;
  }
  // Of threads below `most`, by divisors up to it.
  static constexpr bool is_exact(int most) { return most * most <= 1 << kShift; }
};

}  // namespace merge_attn_states::cuda
