// How many rows there are and how long they are.
#pragma once

#include <cstdint>

namespace merge_attn_states {

// A row is one token of one head: D elements and one LSE.
struct Geometry {
  int64_t num_tokens;  // N
  int64_t num_heads;   // H
  int64_t head_size;   // D

  constexpr bool has_rows() const { return num_tokens > 0 && num_heads > 0; }
  // May overflow where has_rows() is false: nothing then bounds the other size.
  constexpr int64_t num_rows() const { return num_tokens * num_heads; }
};

}  // namespace merge_attn_states
