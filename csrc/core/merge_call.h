// The validated call: what every kernel gets, and the one function that makes it.
#pragma once

#include <cstdint>
#include <stdexcept>

#include "dtypes.h"
#include "tensor_view.h"

namespace merge_attn_states {

// Strides count elements; that of a dimension of size 1 is 0.
struct Rows {
  void* data;  // [N, H, D]
  int64_t token_stride;
  int64_t head_stride;
  int64_t element_stride;
};

struct LseRows {
  void* data;  // [H, N], natural log; null: not asked for
  int64_t head_stride;
  int64_t token_stride;
};

struct MergeArgs {
  int64_t num_tokens;               // N
  int64_t num_heads;                // H
  int64_t head_size;                // D
  int64_t num_tokens_with_context;  // rows of tokens from here on copy the suffix
  Rows output;
  Rows prefix_output;
  Rows suffix_output;
  LseRows prefix_lse;
  LseRows suffix_lse;
  LseRows output_lse;
  const float* output_scale;  // one element on the device; null: no scale
  DType input_dtype;
  DType output_dtype;
  int32_t device_type;
  int32_t device_index;
  void* stream;

  bool nothing_to_do() const {
    return num_tokens == 0 || num_heads == 0 || (head_size == 0 && output_lse.data == nullptr);
  }
  // A row that is copied keeps its bytes where nothing has to be converted.
  constexpr bool copies_bytes() const {
    return input_dtype == output_dtype && output_scale == nullptr;
  }
  // In place on the suffix, what lies past the context count is already what it becomes.
  bool keeps_suffix_rows() const { return output.data == suffix_output.data && copies_bytes(); }
  bool keeps_suffix_lses() const {
    return output_lse.data == nullptr || output_lse.data == suffix_lse.data;
  }
};

// This build or machine lacks what the call needs.
struct Unavailable : std::runtime_error {
  using std::runtime_error::runtime_error;
};

// Checks every operand of the call, outputs included, before anything is read or written. Throws
// std::invalid_argument with a sentence that names the argument, what was expected and what came.
MergeArgs validate(const merge_attn_states_args& args);

}  // namespace merge_attn_states
