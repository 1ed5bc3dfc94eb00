// The table of operands: what each is called, which axes it has, whether it may be left out and
// whether it is written. Validation, both translators and every message walk over it.
#pragma once

#include <array>
#include <type_traits>
#include <utility>

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
  const TensorView* merge_attn_states_args::*field;  // of the C entry's arguments
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

// Calls f with each operand's index in the table's order, as a constant: what the table says of the
// operand is known to the compiler, so that a walk over it costs no more than its checks by hand.
// The first form ends where f is false, and says so.
template <class F>
constexpr bool all_operands(F&& f) {
  const auto walk = [&]<int... kIndex>(std::integer_sequence<int, kIndex...>) {
    return (... && f(std::integral_constant<int, kIndex>{}));
  };
  return walk(std::make_integer_sequence<int, kNumOperands>{});
}

template <class F>
constexpr void for_each_operand(F&& f) {
  all_operands([&](auto i) { return f(i), true; });
}

// Exactly the same memory is legal only for an output and an input of the same axes: then each
// element is read and written by one thread.
constexpr bool may_be_same(const OperandSpec& written, const OperandSpec& other) {
  return !other.written && other.axes == written.axes;
}

}  // namespace merge_attn_states
