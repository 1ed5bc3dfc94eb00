// Where the states lie that are merged, and the one that they become.
#pragma once

#include <cstdint>

#include "host_device.h"

namespace merge_attn_states {

// Strides count elements; that of a dimension of size 1 is 0.
struct Rows {
  void* data;  // [N, H, D]
  int64_t token_stride;
  int64_t head_stride;
  int64_t element_stride;
};

struct Lses {
  void* data;  // [H, N], natural log; null: not asked for
  int64_t token_stride;
  int64_t head_stride;
};

// What attention over some of the keys gives: normalised outputs and their log-sum-exp.
struct State {
  Rows output;
  Lses lse;
};

// Two parts of one dtype; both may lie anywhere.
struct Pair {
  State prefix;
  State suffix;
};

template <class T>
MERGE_ATTN_STATES_HOST_DEVICE T* row_of(const Rows& rows, int64_t token, int64_t head) {
  return static_cast<T*>(rows.data) + (token * rows.token_stride + head * rows.head_stride);
}

template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE Acc* lse_of(const Lses& lses, int64_t token, int64_t head) {
  return static_cast<Acc*>(lses.data) + (token * lses.token_stride + head * lses.head_stride);
}

}  // namespace merge_attn_states
