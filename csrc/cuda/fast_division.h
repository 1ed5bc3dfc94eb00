// Exact division of a number below 2^31 by a divisor known at launch: one multiplication.
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

}  // namespace merge_attn_states::cuda
