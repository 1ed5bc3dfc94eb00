// What both translators share: seven operands and a count become the C entry's arguments, and its
// status an exception. Knows neither Torch nor Python: `Operand` is a translator's own, with
// get(), the view or null.
#pragma once

#include <cstdint>
#include <optional>
#include <stdexcept>

#include "../include/merge_attn_states.h"

namespace merge_attn_states {

// The operands of one call, alive as long as the args that point at them.
template <class Operand>
struct Call {
  Operand output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse;
  std::optional<int64_t> prefill_tokens_with_context;
  Operand output_scale;

  merge_attn_states_args args(void* stream) const {
    return {.version = MERGE_ATTN_STATES_VERSION,
            .has_prefill_tokens_with_context = prefill_tokens_with_context.has_value(),
            .prefill_tokens_with_context = prefill_tokens_with_context.value_or(0),
            .output = output.get(),
            .prefix_output = prefix_output.get(),
            .prefix_lse = prefix_lse.get(),
            .suffix_output = suffix_output.get(),
            .suffix_lse = suffix_lse.get(),
            .output_lse = output_lse.get(),
            .output_scale = output_scale.get(),
            .stream = stream};
  }
};

inline constexpr size_t kMessageSize = 1024;

// A std::invalid_argument arrives in Python as a ValueError with just its text, through PyTorch's
// dispatcher and through pybind11 alike; a std::runtime_error as a RuntimeError.
inline void expect_ok(merge_attn_states_status status, const char* message) {
  if (status == MERGE_ATTN_STATES_OK) return;
  if (status == MERGE_ATTN_STATES_INVALID_ARGUMENT) throw std::invalid_argument(message);
  throw std::runtime_error(message);
}

template <class Operand>
void merge_call(const Call<Operand>& call, void* stream) {
  const merge_attn_states_args args = call.args(stream);
  char message[kMessageSize];
  expect_ok(merge_attn_states_merge(&args, message, sizeof(message)), message);
}

// Needs no stream: nothing is launched.
template <class Operand>
merge_attn_states_selection select_call(const Call<Operand>& call) {
  const merge_attn_states_args args = call.args(nullptr);
  merge_attn_states_selection selection;
  char message[kMessageSize];
  expect_ok(merge_attn_states_select(&args, &selection, message, sizeof(message)), message);
  return selection;
}

}  // namespace merge_attn_states
