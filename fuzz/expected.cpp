#include "expected.h"

#include <algorithm>
#include <cmath>

#include "estimate.h"

namespace merge_attn_states::fuzz {
namespace {

const uint8_t* before(const Call& call, Role role, const Index& index) {
  return before(call.regions[call.operands[role].region], call.view(role), index);
}

// One row: its two LSEs and what the empty rule makes of them.
struct Row {
  Real prefix_lse, suffix_lse;
  bool past_count, nan, takes_prefix, takes_suffix, both_empty;
};

Row row_of(const Call& call, int64_t token, int64_t head) {
  const Format& format = format_of(call.view(kPrefixLse).dtype);
  Row row{};
  row.suffix_lse = value_at(format, before(call, kSuffixLse, {head, token}));
  row.past_count =
      call.args.has_prefill_tokens_with_context && token >= call.args.prefill_tokens_with_context;
  if (row.past_count) {
    row.takes_suffix = true;
    return row;
  }
  row.prefix_lse = value_at(format, before(call, kPrefixLse, {head, token}));
  row.nan = std::isnan(row.prefix_lse) || std::isnan(row.suffix_lse);
  const bool no_prefix = std::isinf(row.prefix_lse), no_suffix = std::isinf(row.suffix_lse);
  row.both_empty = !row.nan && no_prefix && no_suffix;
  row.takes_prefix = !row.nan && no_suffix && !no_prefix;
  row.takes_suffix = !row.nan && no_prefix && !no_suffix;
  return row;
}

Estimate blend(const Call& call, const Row& row, Real prefix, Real suffix) {
  const Real difference = row.prefix_lse - row.suffix_lse;
  const Underflow underflow(call.view(kPrefixOutput).dtype);
  const Real e = underflow.exp(std::fabs(difference));
  const Real larger = 1 / (1 + e), smaller = e / (1 + e);
  const Real value =
      difference >= 0 ? larger * prefix + smaller * suffix : smaller * prefix + larger * suffix;
  const Real most = std::max(std::fabs(prefix), std::fabs(suffix));
  const bool undecided = std::isinf(difference >= 0 ? suffix : prefix) &&
                         underflow.is_undecided(std::fabs(difference));
  return {value, std::isfinite(most) ? 8 * epsilon(call.view(kPrefixOutput).dtype) * most : 0,
          undecided};
}

void check_element(const Call& call, const Row& row, const Index& index, const uint8_t* address) {
  const int64_t i = index[0], j = index[1], k = index[2];
  const Format& in = format_of(call.view(kPrefixOutput).dtype);
  const Format& out = format_of(call.view(kOutput).dtype);
  const bool scaled = call.operands[kOutputScale].given;
  const Real got = value_at(out, address);
  if (row.both_empty) {
    if (code_at(out, address) != 0) fail("output[%ld, %ld, %ld]: both empty, not 0", i, j, k);
    return;
  }
  const uint8_t* suffix = before(call, kSuffixOutput, index);
  const uint8_t* prefix = before(call, kPrefixOutput, index);
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
    expected = divide(expected, value_at(f32, before(call, kOutputScale, {})), 0x1p-23L);
  }
  if (!is_close(out, got, expected, is_fp8(out.dtype))) {
    fail("output[%ld, %ld, %ld]: expected %.20Lg +- %.3Lg, got %.20Lg; lse %.9Lg and %.9Lg", i, j,
         k, expected.value, expected.error, got, row.prefix_lse, row.suffix_lse);
  }
}

}  // namespace

void check_output(const Call& call) {
  Row row;
  for_each_element(call.view(kOutput), [&](const Index& index, const uint8_t* address) {
    if (index[2] == 0) row = row_of(call, index[0], index[1]);
    check_element(call, row, index, address);
  });
}

void check_output_lse(const Call& call) {
  if (!call.operands[kOutputLse].given) return;
  const Format& format = format_of(call.view(kOutputLse).dtype);
  for_each_element(call.view(kOutputLse), [&](const Index& index, const uint8_t* address) {
    const int64_t head = index[0], token = index[1];
    const Row row = row_of(call, token, head);
    const Real got = value_at(format, address);
    Real expected = row.takes_prefix ? row.prefix_lse : row.suffix_lse, error = 0;
    if (row.nan) expected = NAN;
    if (row.both_empty) expected = -kInf;
    if (!row.nan && !row.both_empty && !row.takes_prefix && !row.takes_suffix) {
      const Real difference = std::fabs(row.prefix_lse - row.suffix_lse);
      expected = std::max(row.prefix_lse, row.suffix_lse) + std::log1p(std::exp(-difference));
      error = 4 * epsilon(call.view(kPrefixOutput).dtype) * std::max<Real>(1, std::fabs(expected));
    }
    const bool same = got == expected || (std::isnan(got) && std::isnan(expected));
    if (!same && !(std::fabs(got - expected) <= error)) {
      fail("output_lse[%ld, %ld]: expected %.20Lg +- %.3Lg, got %.20Lg", head, token, expected,
           error, got);
    }
  });
}

}  // namespace merge_attn_states::fuzz
