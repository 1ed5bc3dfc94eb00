// What stands behind choose and run in merge.cpp: one kernel family a device.
#pragma once

#include <cstdio>

#include "merge_args.h"

namespace merge_attn_states {

// Names as `selected_kernel` shows them; a longer one is cut.
using Selection = merge_attn_states_selection;

inline Selection selection(const char* kernel, const char* variant) {
  Selection result;
  std::snprintf(result.kernel, sizeof(result.kernel), "%s", kernel);
  std::snprintf(result.variant, sizeof(result.variant), "%s", variant);
  return result;
}

namespace cpu {
Selection choose();
void run(const MergeArgs& args);
}  // namespace cpu

namespace cuda {
// Throw Unavailable in a build without CUDA.
Selection choose(const MergeArgs& args);
void run(const MergeArgs& args);
}  // namespace cuda

// The CUDA runtime refused; the text says what and, where it is known, what to do.
struct CudaError : std::runtime_error {
  using std::runtime_error::runtime_error;
};

}  // namespace merge_attn_states
