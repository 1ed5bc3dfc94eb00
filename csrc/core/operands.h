// The table of operands: what each is called, which axes it has, whether it may be left out and
// whether it is written. Validation, both translators and every message walk over it.
#pragma once

#include <array>

#include "tensor_view.h"

namespace merge_attn_states {

enum class Axes {
  kRows,  // [num_tokens, num_heads, head_size]
  kLses,  // [num_heads, num_tokens]
  kOne,   // one element, of any rank
};

struct OperandSpec {
  const char* name;
  Axes axes;
  bool optional;
  bool written;
  const TensorView* merge_attn_states_args::*place;  // in the C entry's arguments
};

// In the order of the operator's schema, where the context count stands between the last two.
enum OperandIndex {
  kOutput,
  kPrefixOutput,
  kPrefixLse,
  kSuffixOutput,
  kSuffixLse,
  kOutputLse,
  kOutputScale,
  kNumOperands
};

inline constexpr std::array<OperandSpec, kNumOperands> kOperands = {{
    {"output", Axes::kRows, false, true, &merge_attn_states_args::output},
    {"prefix_output", Axes::kRows, false, false, &merge_attn_states_args::prefix_output},
    {"prefix_lse", Axes::kLses, false, false, &merge_attn_states_args::prefix_lse},
    {"suffix_output", Axes::kRows, false, false, &merge_attn_states_args::suffix_output},
    {"suffix_lse", Axes::kLses, false, false, &merge_attn_states_args::suffix_lse},
    {"output_lse", Axes::kLses, true, true, &merge_attn_states_args::output_lse},
    {"output_scale", Axes::kOne, true, false, &merge_attn_states_args::output_scale},
}};

inline constexpr const char* kCountName = "prefill_tokens_with_context";

// Exactly the same memory is legal only for an output and an input of the same axes: then each
// element is read and written by one thread.
constexpr bool may_be_same(const OperandSpec& written, const OperandSpec& other) {
  return !other.written && other.axes == written.axes;
}

}  // namespace merge_attn_states
