// What the entries of many parts bring, between what their callers hand over and a validated call.
#pragma once

#include <array>
#include <string>
#include <vector>

#include "checks.h"
#include "parts_call.h"

namespace merge_attn_states {

struct PartOperands {
  Operand output, lse, empty, index;
  Base base;
};

// What both entries bring, by the names that their callers know.
struct PartsOperands {
  Operand out, out_lse, sink, scale;           // of a backward call out is its gradient
  Operand grad_outputs, grad_lses, grad_sink;  // of a backward call
  std::vector<PartOperands> parts;
  int num_parts = 0;
  int stack_dim = -1;    // of a stack, which is one part with a dimension more
  int state = -1;        // the part that `out` is by definition
  int num_row_dims = 0;  // of the merge
  Base out_base;
  bool has_index = false;
  bool is_backward = false;

  bool is_stack() const { return stack_dim >= 0; }
  // Whose shape the merge has: the first part, beside a state the block.
  const Operand& reference() const { return parts[state < 0 ? 0 : 1].output; }
};

// As far as a shape goes: row dimensions and head_size.
using Shape = std::array<int64_t, kMaxRowDims + 2>;

// The shape of the merge: that of the first output, with its index, or of the block. `where`, if it
// is asked for, says so.
Shape shape_of_rows(const PartsOperands& operands, std::string* where);

// What a result of parts of that dtype may be; `name` is what the caller knows it by.
void check_out_dtype(Name name, DType out, DType parts, bool has_scale);

// Everything but the numbers of parts that differ.
void check(PartsOperands& operands);

}  // namespace merge_attn_states
