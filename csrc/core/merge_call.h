// A call that has been validated: what every kernel's launcher gets, and the one function that
// makes it.
#pragma once

#include <cstdint>

#include "dtypes.h"
#include "geometry.h"
#include "row_rule.h"
#include "tensor_view.h"

namespace merge_attn_states {

struct MergeCall {
  Geometry geometry;
  Pair parts;
  State merged;
  RowRule rule;
  DType input_dtype;
  DType output_dtype;
  bool output_is_suffix;      // exactly: the same memory, the same strides
  bool output_lse_is_suffix;  // the same of the LSE
  int32_t device_type;
  int32_t device_index;
  bool dependent_launch;
  void* stream;

  bool nothing_to_do() const {
    return !geometry.has_rows() || (geometry.head_size == 0 && merged.lse.data == nullptr);
  }
  // A row that is copied keeps its bytes where nothing has to be converted.
  bool copies_bytes() const { return input_dtype == output_dtype && rule.output_scale == nullptr; }
  bool every_row_has_prefix() const { return rule.num_tokens_with_context >= geometry.num_tokens; }
  // In place on the suffix, what lies past the context count is already what it becomes.
  bool has_rows_to_keep() const {
    return output_is_suffix && copies_bytes() && !every_row_has_prefix();
  }
  bool keeps_suffix_lses() const { return merged.lse.data == nullptr || output_lse_is_suffix; }
};

// Checks every operand of the call, outputs included, before anything is read or written. Throws
// std::invalid_argument with a sentence that names the argument, what was expected and what came.
MergeCall validate(const merge_attn_states_args* args);

}  // namespace merge_attn_states
