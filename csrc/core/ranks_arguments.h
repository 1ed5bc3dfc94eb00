// A merge across ranks as torch/ hands it over, and the call that it becomes.
#pragma once

#include <cstdint>

#include "ranks_call.h"
#include "tensor_view.h"

namespace merge_attn_states {

// What stays from call to call: int64s on the CPU, and behind them each rank's memory, and each
// rank's buffer.
struct RanksObject {
  int64_t rank, ranks;
  int64_t scatters;  // a rank gets its share of the heads, else all
  int64_t max_tokens, num_heads, merged_heads, head_size;
  int64_t device_index;
  int64_t limit_ns;         // how long others are waited for
  int64_t multiprocessors;  // of the rank's GPU that has the fewest
  uint32_t* numbers;
  int64_t* report;

  char* const* memory() const { return reinterpret_cast<char* const*>(this + 1); }
  char* const* buffers() const { return memory() + ranks; }
};

struct RanksArguments {
  const TensorView *out, *output, *lse;
  const TensorView *out_lse, *empty;   // or null
  const TensorView *lengths, *starts;  // or null, both
  bool nan_is_empty, base_is_two, is_in_buffer;
  const RanksObject* object;
  void* stream;
};

RanksCall ranks_call(const RanksArguments& args);

}  // namespace merge_attn_states
