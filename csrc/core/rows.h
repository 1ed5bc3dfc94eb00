// Where a row lies, and what its LSEs make of it: the first step of every kernel.
#pragma once

#include "lse.h"
#include "merge_args.h"

namespace merge_attn_states {

template <class T>
MERGE_ATTN_STATES_HOST_DEVICE T* row_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + token * rows.token_stride + head * rows.head_stride;
}

template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE Acc* lse_of(const LseRows& rows, int64_t token, int64_t head) {
  return static_cast<Acc*>(rows.data) + head * rows.head_stride + token * rows.token_stride;
}

// `prefix_lse` means nothing where the row has no prefix.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE auto weigh(bool has_prefix, Acc prefix_lse, Acc suffix_lse) {
  return has_prefix ? merge_lse<ScalarMath<Acc>>(prefix_lse, suffix_lse) : take_suffix(suffix_lse);
}

// Reads a row's LSEs. In place the merged one replaces one of them, so a row is weighed once, by
// the thread that then calls store_lse.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE auto weigh_row(const MergeArgs& args, int64_t token, int64_t head) {
  const bool has_prefix = token < args.num_tokens_with_context;
  return weigh(has_prefix, has_prefix ? *lse_of<Acc>(args.prefix_lse, token, head) : Acc(0),
               *lse_of<Acc>(args.suffix_lse, token, head));
}

// Nothing where the merged LSE is not asked for: nor is its logarithm computed then.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE void store_lse(const MergeArgs& args, int64_t token, int64_t head,
                                             const MergedLse<ScalarMath<Acc>, Acc>& merged) {
  if (args.output_lse.data != nullptr) *lse_of<Acc>(args.output_lse, token, head) = merged.lse();
}

}  // namespace merge_attn_states
