// What a row becomes beside the merge of its parts: past the context count the suffix, and with a
// scale a quotient.
#pragma once

#include "parts.h"
#include "state.h"

namespace merge_attn_states {

struct RowRule {
  int64_t num_tokens_with_context;  // rows of tokens from here on copy the suffix
  const float* output_scale;        // one element on the device; null: no scale
};

// `prefix_lse` means nothing where the row has no prefix. Without a branch: a GPU's thread is
// sooner through both than through the jump.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE auto weigh(bool has_prefix, Acc prefix_lse, Acc suffix_lse) {
  auto row = merge_lse<ScalarMath<Acc>>(prefix_lse, suffix_lse);
  const auto copy = take_suffix(suffix_lse);
  row.weights.prefix = has_prefix ? row.weights.prefix : copy.weights.prefix;
  row.weights.suffix = has_prefix ? row.weights.suffix : copy.weights.suffix;
  row.base = has_prefix ? row.base : copy.base;
  row.e = has_prefix ? row.e : copy.e;
  return row;
}

// Reads a row's LSEs. In place the merged one replaces one of them, so a row is weighed once, by
// the thread that then calls store_lse.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE auto weigh_row(const Pair& parts, const RowRule& rule, int64_t token,
                                             int64_t head) {
  const bool has_prefix = token < rule.num_tokens_with_context;
  return weigh(has_prefix, has_prefix ? *lse_of<Acc>(parts.prefix.lse, token, head) : Acc(0),
               *lse_of<Acc>(parts.suffix.lse, token, head));
}

// Nothing where the merged LSE is not asked for: nor is its logarithm computed then.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE void store_lse(const Lses& lses, int64_t token, int64_t head,
                                             const MergedLse<ScalarMath<Acc>, Acc>& merged) {
  if (lses.data != nullptr) *lse_of<Acc>(lses, token, head) = merged.lse();
}

}  // namespace merge_attn_states
