// What stands behind choose and run in entry.cpp: one kernel family a device.
#pragma once

#include <cstdio>
#include <stdexcept>

#include "core/merge_call.h"
#include "core/parts_call.h"
#include "core/ranks_call.h"

namespace merge_attn_states {

// Names as `selected_kernel` shows them; a longer one is cut.
using Selection = merge_attn_states_selection;

inline Selection selection(const char* kernel, const char* variant) {
  Selection result{.struct_size = sizeof(Selection)};
  std::snprintf(result.kernel, sizeof(result.kernel), "%s", kernel);
  std::snprintf(result.variant, sizeof(result.variant), "%s", variant);
  return result;
}

namespace cpu {
Selection choose();
void run(const MergeCall& call);
void run(const PartsCall& call);
void run_backward(const PartsCall& call);
}  // namespace cpu

namespace cuda {
// Throw Unavailable in a build without CUDA.
Selection choose(const MergeCall& call);
void run(const MergeCall& call);
Selection choose(const PartsCall& call);
void run(const PartsCall& call);
void run_backward(const PartsCall& call);
PeerLayout peer_layout(int64_t ranks, int64_t max_rows, int64_t row_bytes);
void run(const RanksCall& call);
}  // namespace cuda

// This build or machine lacks what the call needs.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// The CUDA runtime refused; the text says what and, where it is known, what to do.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace merge_attn_states
