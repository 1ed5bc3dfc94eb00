// A validated call of any number of parts, and the functions that make it: of a merge into tensors
// of its own, of an update of a running state, and of a merge's gradients.
#pragma once

#include <cstdint>
#include <optional>
#include <vector>

#include "dtypes.h"
#include "host_device.h"
#include "lse_base.h"
#include "merge_call.h"
#include "state.h"
#include "tensor_view.h"

namespace merge_attn_states {

inline constexpr int kMaxRowDims = 4;

// What a kernel's parameters hold (32,764 bytes): parts that each have a layout, a dtype, a base,
// an index and a mask of their own, and parts that differ in their addresses alone.
inline constexpr int kMaxParts = 200;
inline constexpr int kMaxAlikeParts = 1024;

struct RowCoordinates {
  int64_t of[kMaxRowDims];
};

// Something that each row has, at this address for row 0. Strides count elements, or bytes of a
// mask; that of a dimension of size 1 is 0.
struct PerRow {
  void* data = nullptr;  // not given
  int64_t strides[kMaxRowDims]{};

  MERGE_ATTN_STATES_HOST_DEVICE int64_t offset(const RowCoordinates& row) const {
    static_assert(kMaxRowDims == 4);
    const int64_t sum = row.of[0] * strides[0] + row.of[1] * strides[1];
    // Most calls have two dimensions; and a compiler makes vectors of four products, which is slow.
    if ((row.of[2] | row.of[3]) == 0) return sum;
    return sum + row.of[2] * strides[2] + row.of[3] * strides[3];
  }
};

// Which row of an operand serves each place of the first row dimension.
struct RowIndex {
  const void* data = nullptr;  // null: its own
  int64_t stride = 0;          // in elements
  int64_t num_rows = 0;        // of the operand

  MERGE_ATTN_STATES_HOST_DEVICE bool has(int64_t row) const { return row >= 0 && row < num_rows; }
  // -1: none.
  MERGE_ATTN_STATES_HOST_DEVICE int64_t at(int64_t place, bool is_64_bit) const {
    const int64_t row = is_64_bit ? static_cast<const int64_t*>(data)[place * stride]
                                  : static_cast<const int32_t*>(data)[place * stride];
    return has(row) ? row : -1;
  }
  // Makes the coordinates those of the operand's own row; false where it has none.
  MERGE_ATTN_STATES_HOST_DEVICE bool find(RowCoordinates& row, bool is_64_bit) const {
    if (data != nullptr) row.of[0] = at(row.of[0], is_64_bit);
    return row.of[0] >= 0;
  }
};

struct Part {
  PerRow output;
  int64_t element_stride = 1;
  PerRow lse;
  PerRow empty;
  RowIndex index;
  DType dtype;
  Base base;
  bool index_is_64_bit;

  // Whether the caller's mask, which is given, says there that the part saw no keys.
  MERGE_ATTN_STATES_HOST_DEVICE bool is_declared_empty(int64_t offset, bool is_inverted) const {
    return (static_cast<const uint8_t*>(empty.data)[offset] != 0) != is_inverted;
  }
};
static_assert(sizeof(Part) == 160, "a kernel's parameters hold kMaxParts of them");

// What a backward call writes, dense: [num_parts, *rows, D], [num_parts, *rows] and [*rows]. Null:
// not asked for.
struct Gradients {
  void* outputs;
  void* lses;
  void* sink;  // of each row; their sum is for the caller
  DType outputs_dtype;
};

// A merge; or the backward call of one, which reads the gradients of its results in their place.
struct PartsCall {
  // Row dimensions that continue one another in every operand are one. The others of kMaxRowDims
  // are 1; the first one stays alone where an index counts along it.
  int64_t sizes[kMaxRowDims];
  int64_t head_size;

  std::vector<Part> parts;  // of a stack the first one
  int num_parts;
  bool is_stack;
  int64_t stack_output_stride, stack_lse_stride;  // from part to part

  PerRow out;
  int64_t out_element_stride;
  PerRow out_lse;      // may be not given
  RowIndex out_index;  // of an update, the first part's
  bool out_index_is_64_bit;
  PerRow sink;  // may be not given
  DType sink_dtype;
  const float* out_scale;  // null: no scale

  DType out_dtype;
  DType acc_dtype;   // float32 or float64
  Base base;         // in which LSEs are compared
  bool mixes_bases;  // of parts, or of the parts and the sink: then `base` is natural
  Base out_base;
  bool invert_empty;
  bool parts_are_alike;  // in all but their addresses, and without index and mask
  int32_t device_type;
  int32_t device_index;
  bool dependent_launch;
  void* stream;
  Gradients gradients;  // of a backward call

  // In all but the addresses of a stack's parts, which the two functions below it give.
  const Part& part(int k) const { return parts[is_stack ? 0 : k]; }
  void* output_data(int k) const {
    const int64_t offset = is_stack ? k * stack_output_stride : 0;
    return static_cast<char*>(part(k).output.data) + offset * size_of(part(k).dtype);
  }
  void* lse_data(int k) const {
    const int64_t offset = is_stack ? k * stack_lse_stride : 0;
    return static_cast<char*>(part(k).lse.data) + offset * size_of(acc_dtype);
  }
  // Of all parts but the first, where they have one.
  DType dtype_of_others() const { return part(num_parts > 1 ? 1 : 0).dtype; }
  LseRule lse_rule() const {
    const bool is_natural = base == Base::kE && !mixes_bases;
    return {base, out_base, is_natural && num_parts == 2 && sink.data == nullptr};
  }
  // Exactly in place; elsewhere an LSE that is read is none that is written.
  bool replaces_an_lse() const {
    for (int k = 0; k < num_parts; ++k) {
      if (lse_data(k) == out_lse.data) return true;
    }
    return false;
  }
  int64_t num_rows() const { return sizes[0] * sizes[1] * sizes[2] * sizes[3]; }
  bool nothing_to_do() const {
    for (const int64_t size : sizes) {
      if (size == 0) return true;
    }
    return head_size == 0 && out_lse.data == nullptr && gradients.lses == nullptr &&
           gradients.sink == nullptr;
  }
};

// Check every operand of the call, outputs included, before anything is read or written. Throw
// std::invalid_argument with a sentence that names the argument, what was expected and what came.
PartsCall validate(const merge_attn_states_parts_args* args);
PartsCall validate(const merge_attn_states_update_args* args);
PartsCall validate(const merge_attn_states_backward_args* args);

// The same call as one of the pair's, which then gives the same bits.
std::optional<MergeCall> as_pair(const PartsCall& call);

}  // namespace merge_attn_states
