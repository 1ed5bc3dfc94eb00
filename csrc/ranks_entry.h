// The entry of a merge across ranks, for torch/ alone: what is wrong with a call RankMerge has said
// (distributed.py), and what ranks hold in each other's memory may change with the library.
#pragma once

#include <cstddef>
#include <cstdint>

#include "core/tensor_view.h"

namespace merge_attn_states {

struct RanksArguments {
  const TensorView *out, *out_lse, *output, *lse;
  const TensorView* empty;             // or null
  const TensorView *lengths, *starts;  // or null, both
  bool nan_is_empty, base_is_two, is_in_buffer;
  // Rank, ranks, whether heads are scattered, max_rows, the limit in ns, multiprocessors, the
  // addresses of numbers and report, each rank's memory, and each rank's buffer.
  const int64_t* peers;
  void* stream;
};

}  // namespace merge_attn_states

extern "C" MERGE_ATTN_STATES_API merge_attn_states_status merge_attn_states_merge_ranks(
    const merge_attn_states::RanksArguments* args, char* message, size_t message_size) noexcept;
