// How the C entry's answer leaves an operator.
#pragma once

#include <stdexcept>

#include "../../include/merge_attn_states.h"

namespace merge_attn_states {

struct Message {
  char text[1024] = "";
};

// A std::invalid_argument arrives in Python as a ValueError up to PyTorch 2.14 and as a
// RuntimeError from then on, a std::runtime_error as a RuntimeError; both with just their text.
inline void expect_ok(merge_attn_states_status status, const Message& message) {
  if (status == MERGE_ATTN_STATES_OK) return;
  if (status == MERGE_ATTN_STATES_INVALID_ARGUMENT) throw std::invalid_argument(message.text);
  throw std::runtime_error(message.text);
}

}  // namespace merge_attn_states
