#include "expected.h"

#include <algorithm>
#include <cmath>
#include <cstdarg>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <limits>

#include "values.h"

namespace merge_attn_states::fuzz {
namespace {

using Real = long double;

constexpr Real kInf = std::numeric_limits<Real>::infinity();

// Where an element lies in the copy that was made before the call.
const uint8_t* before(const Call& call, Role role, int64_t i, int64_t j, int64_t k) {
  const merge_attn_states_tensor& view = call.view(role);
  const int64_t index[] = {i, j, k};
  int64_t offset = 0;
  for (int32_t at = 0; at < std::min(view.rank, 3); ++at) {
    if (view.sizes[at] != 1) offset += index[at] * view.strides[at];
  }
  const Region& region = call.regions[call.operands[role].region];
  return region.before.data() + (static_cast<uint8_t*>(view.data) - region.bytes.get()) +
         offset * bytes_of(view.dtype);
}

// One row: its two LSEs and what the empty rule makes of them.
struct Row {
  Real prefix_lse, suffix_lse;
  bool past_count, nan, takes_prefix, takes_suffix, both_empty;
};

Row row_of(const Call& call, int64_t token, int64_t head) {
  const Format& format = format_of(call.view(kPrefixLse).dtype);
  Row row{};
  row.suffix_lse = value_at(format, before(call, kSuffixLse, head, token, 0));
  row.past_count =
      call.args.has_prefill_tokens_with_context && token >= call.args.prefill_tokens_with_context;
  if (row.past_count) {
    row.takes_suffix = true;
    return row;
  }
  row.prefix_lse = value_at(format, before(call, kPrefixLse, head, token, 0));
  row.nan = std::isnan(row.prefix_lse) || std::isnan(row.suffix_lse);
  const bool no_prefix = std::isinf(row.prefix_lse), no_suffix = std::isinf(row.suffix_lse);
  row.both_empty = !row.nan && no_prefix && no_suffix;
  row.takes_prefix = !row.nan && no_suffix && !no_prefix;
  row.takes_suffix = !row.nan && no_prefix && !no_suffix;
  return row;
}

Real epsilon(const Call& call) {
  return call.view(kPrefixOutput).dtype == MERGE_ATTN_STATES_FLOAT64 ? 0x1p-52L : 0x1p-23L;
}

// A value with the error that arithmetic in float32 (or float64) may have.
struct Estimate {
  Real value;
  Real error;
  bool or_nan = false;  // infinity times a weight about which the precision decides: 0 or not
};

Estimate blend(const Call& call, const Row& row, Real prefix, Real suffix) {
  const Real difference = row.prefix_lse - row.suffix_lse;
  const bool wide = call.view(kPrefixOutput).dtype == MERGE_ATTN_STATES_FLOAT64;
  const Real surely_0 = wide ? 750 : 104.5, surely_not_0 = wide ? 700 : 103.5;
  Real e = std::exp(-std::fabs(difference));
  if (std::fabs(difference) > surely_0) e = 0;
  const Real larger = 1 / (1 + e), smaller = e / (1 + e);
  const Real value =
      difference >= 0 ? larger * prefix + smaller * suffix : smaller * prefix + larger * suffix;
  const Real most = std::max(std::fabs(prefix), std::fabs(suffix));
  const bool undecided = std::isinf(difference >= 0 ? suffix : prefix) &&
                         std::fabs(difference) > surely_not_0 && std::fabs(difference) <= surely_0;
  return {value, std::isfinite(most) ? 8 * epsilon(call) * most : 0, undecided};
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

void check_element(const Call& call, const Row& row, int64_t i, int64_t j, int64_t k,
                   const uint8_t* address) {
  const Format& in = format_of(call.view(kPrefixOutput).dtype);
  const Format& out = format_of(call.view(kOutput).dtype);
  const bool scaled = call.operands[kOutputScale].given;
  const Real got = value_at(out, address);
  if (row.both_empty) {
    if (code_at(out, address) != 0) fail("output[%ld, %ld, %ld]: both empty, not 0", i, j, k);
    return;
  }
  const uint8_t* suffix = before(call, kSuffixOutput, i, j, k);
  const uint8_t* prefix = before(call, kPrefixOutput, i, j, k);
  const uint8_t* taken = row.takes_prefix ? prefix : row.takes_suffix ? suffix : nullptr;
  if (taken != nullptr && in.dtype == out.dtype && !scaled) {
    if (code_at(out, address) != code_at(in, taken)) {
      fail("output[%ld, %ld, %ld]: a copied row lost a bit", i, j, k);
    }
    return;
  }
  Estimate expected{NAN, 0};
  if (taken != nullptr) {
    expected = {value_at(in, taken), 0};
  } else if (!row.nan) {
    expected = blend(call, row, value_at(in, prefix), value_at(in, suffix));
  }
  if (scaled) {
    const Format& f32 = format_of(MERGE_ATTN_STATES_FLOAT32);
    expected = divide(expected, value_at(f32, before(call, kOutputScale, 0, 0, 0)), 0x1p-23L);
  }
  if (!is_close(out, got, expected, is_fp8(out.dtype))) {
    fail("output[%ld, %ld, %ld]: expected %.20Lg +- %.3Lg, got %.20Lg; lse %.9Lg and %.9Lg", i, j,
         k, expected.value, expected.error, got, row.prefix_lse, row.suffix_lse);
  }
}

}  // namespace

void fail(const char* format, ...) {
  va_list arguments;
  va_start(arguments, format);
  std::vfprintf(stderr, format, arguments);
  std::fputc('\n', stderr);
  va_end(arguments);
  std::abort();
}

void check_untouched(const Call& call, bool written) {
  for (size_t r = 0; r < call.regions.size(); ++r) {
    const Region& region = call.regions[r];
    std::vector<uint8_t> others(region.bytes.get(), region.bytes.get() + region.size);
    for (Role role : {kOutput, kOutputLse}) {
      const Operand& operand = call.operands[role];
      if (!written || !operand.given || operand.region != static_cast<int>(r)) continue;
      for_each_element(operand.view, [&](int64_t, int64_t, int64_t, const uint8_t* address) {
        const int64_t at = address - region.bytes.get();
        std::memcpy(&others[at], &region.before[at], bytes_of(operand.view.dtype));
      });
    }
    if (others != region.before) {
      fail("a byte of region %zu was written that belongs to no output", r);
    }
  }
}

void check_output(const Call& call) {
  Row row;
  for_each_element(call.view(kOutput), [&](int64_t i, int64_t j, int64_t k, const uint8_t* at) {
    if (k == 0) row = row_of(call, i, j);
    check_element(call, row, i, j, k, at);
  });
}

void check_output_lse(const Call& call) {
  if (!call.operands[kOutputLse].given) return;
  const Format& format = format_of(call.view(kOutputLse).dtype);
  for_each_element(
      call.view(kOutputLse), [&](int64_t head, int64_t token, int64_t, const uint8_t* address) {
        const Row row = row_of(call, token, head);
        const Real got = value_at(format, address);
        Real expected = row.takes_prefix ? row.prefix_lse : row.suffix_lse, error = 0;
        if (row.nan) expected = NAN;
        if (row.both_empty) expected = -kInf;
        if (!row.nan && !row.both_empty && !row.takes_prefix && !row.takes_suffix) {
          const Real difference = std::fabs(row.prefix_lse - row.suffix_lse);
          expected = std::max(row.prefix_lse, row.suffix_lse) + std::log1p(std::exp(-difference));
          error = 4 * epsilon(call) * std::max<Real>(1, std::fabs(expected));
        }
        const bool same = got == expected || (std::isnan(got) && std::isnan(expected));
        if (!same && !(std::fabs(got - expected) <= error)) {
          fail("output_lse[%ld, %ld]: expected %.20Lg +- %.3Lg, got %.20Lg", head, token, expected,
               error, got);
        }
      });
}

}  // namespace merge_attn_states::fuzz
