#include "estimate.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>

namespace merge_attn_states::fuzz {

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

Real epsilon(uint32_t dtype) { return dtype == MERGE_ATTN_STATES_FLOAT64 ? 0x1p-52L : 0x1p-23L; }

Underflow::Underflow(uint32_t dtype)
    : surely_0(dtype == MERGE_ATTN_STATES_FLOAT64 ? 750 : 104.5),
      surely_not_0(dtype == MERGE_ATTN_STATES_FLOAT64 ? 700 : 103.5) {}

Real Underflow::exp(Real difference) const {
  return difference > surely_0 ? 0 : std::exp(-difference);
}

bool Underflow::is_undecided(Real difference) const {
  return difference > surely_not_0 && difference <= surely_0;
}

Estimate divide(const Estimate& value, Real scale, Real eps) {
  const Real quotient = value.value / scale;
  // Near zero over zero: NaN or an infinity of either sign, as the last bit decides.
  const bool undecided = scale == 0 && std::fabs(value.value) <= value.error && value.error > 0;
  const Real error = std::isfinite(quotient) ? value.error / std::fabs(scale) : 0;
  return {quotient, error + (std::isfinite(quotient) ? eps * std::fabs(quotient) : 0),
          value.or_nan || undecided};
}

bool is_close(const Format& format, Real got, const Estimate& expected, bool saturates) {
  if (std::isnan(got)) return std::isnan(expected.value) || expected.or_nan;
  if (std::isnan(expected.value)) return expected.or_nan;
  Real low = expected.value - expected.error, high = expected.value + expected.error;
  if (expected.or_nan) low = -kInf, high = kInf;
  const Real largest = format.largest();
  if (saturates) {
    if (std::isinf(got)) return false;
    low = std::clamp(low, -largest, largest), high = std::clamp(high, -largest, largest);
  }
  if (std::isinf(got)) return got > 0 ? high >= largest : low <= -largest;
  if (std::isinf(low) && std::isinf(high) && low == high) return false;
  const Real half = format.ulp(std::max(std::fabs(got), std::isinf(low) ? 0 : std::fabs(low))) / 2;
  return got >= low - half && got <= high + half;
}

void check_untouched(const Regions& regions, const std::vector<const Operand*>& written) {
  for (size_t r = 0; r < regions.size(); ++r) {
    const Region& region = regions[r];
    std::vector<uint8_t> others(region.bytes.get(), region.bytes.get() + region.size);
    for (const Operand* operand : written) {
      if (!operand->given || operand->region != static_cast<int>(r)) continue;
      for_each_element(operand->view, [&](const Index&, const uint8_t* address) {
        const int64_t at = address - region.bytes.get();
        std::memcpy(&others[at], &region.before[at], bytes_of(operand->view.dtype));
      });
    }
    if (others != region.before) {
      fail("a byte of region %zu was written that belongs to no output", r);
    }
  }
}

std::vector<std::vector<uint8_t>> copy_of(const Regions& regions) {
  std::vector<std::vector<uint8_t>> copy;
  for (const Region& region : regions) {
    copy.emplace_back(region.bytes.get(), region.bytes.get() + region.size);
  }
  return copy;
}

void restore(const Regions& regions) {
  for (const Region& region : regions) {
    std::copy(region.before.begin(), region.before.end(), region.bytes.get());
  }
}

void check_same(const Regions& regions, const std::vector<const Operand*>& written,
                const std::vector<std::vector<uint8_t>>& copy) {
  for (const Operand* operand : written) {
    if (!operand->given) continue;
    const Format& format = format_of(operand->view.dtype);
    for_each_element(operand->view, [&](const Index&, const uint8_t* address) {
      const uint8_t* other =
          copy[operand->region].data() + (address - regions[operand->region].bytes.get());
      const bool same = code_at(format, address) == code_at(format, other);
      // Which of two NaN an addition returns is the compiler's choice of operand order.
      const Real a = value_at(format, address), b = value_at(format, other);
      if (!same && !(a != a && b != b)) {
        fail("%s: the builds give %.20Lg and %.20Lg", operand->name.c_str(), b, a);
      }
    });
  }
}

}  // namespace merge_attn_states::fuzz
