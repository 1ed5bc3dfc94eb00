// What a call answers: a status and a sentence.
#pragma once

#include "touch.h"

namespace merge_attn_states::fuzz {

struct Answer {
  merge_attn_states_status status;
  std::string message;
};

void check_ended(const char* message, size_t size);

// With a buffer of exactly `size` bytes, so that a byte too much is seen.
template <class F>
Answer answer(size_t size, F&& f) {
  const auto message = std::make_unique<char[]>(size);
  std::fill_n(message.get(), size, 'x');
  const auto status = f(size == 0 ? nullptr : message.get(), size);
  if (size == 0 || status == MERGE_ATTN_STATES_OK) return {status, ""};
  check_ended(message.get(), size);
  return {status, message.get()};
}

// A refusal names an argument that is at fault, and says the same in a buffer of `size` bytes.
void check_sentence(const Names& faulty, const Answer& whole, const Answer& cut, size_t size);

// Shows a finding.
void describe(const Regions& regions, const Operand& operand);

}  // namespace merge_attn_states::fuzz
