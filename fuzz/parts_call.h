// A fuzz input read as one call of an entry of many parts: of a merge, an update or a merge's
// backward call.
//
// Zero bytes give an ordinary merge, so that what a mutation changes is one property of a call that
// is otherwise legal.
#pragma once

#include <deque>

#include "operand.h"
#include "place.h"
#include "values.h"

namespace merge_attn_states::fuzz {

enum class Entry { kMerge, kUpdate, kBackward };

struct FuzzedPart {
  Operand output, lse, empty, index;
  merge_attn_states_part part{};
  Passed<merge_attn_states_part> passed = {};
  bool is_null = false;
};

// Some dimensions of an operand, of one part of a stack.
struct View {
  const Region* region;
  std::vector<int64_t> sizes, strides;
  merge_attn_states_tensor view;

  View(const Regions& regions, const Operand& operand, int rank, int without = -1, int64_t at = 0);
  View(const View&) = delete;
  View(View&&) = default;
};

struct CallOfParts {
  CallOfParts(const uint8_t* data, size_t size);
  CallOfParts(const CallOfParts&) = delete;  // structs point into operands

  Entry entry;
  Regions regions;  // [0] is shared, each other belongs to one operand at first
  // Of a stack its one, of an update the state and the block. A list longer than these has them
  // again and again.
  std::deque<FuzzedPart> parts;
  Operand out, out_lse;  // of a backward call their gradients; of an update not given
  Operand sink, scale, grad_outputs, grad_lses, grad_sink;
  std::vector<const merge_attn_states_part*> listed;
  bool is_stack = false, is_null = false;
  int num_parts;  // as the call was before anything is odd

  // What the library must see of what is passed.
  merge_attn_states_parts_args args{};
  merge_attn_states_update_args update{};
  merge_attn_states_backward_args backward{};
  Passed<merge_attn_states_parts_args> passed_args;
  Passed<merge_attn_states_update_args> passed_update;
  Passed<merge_attn_states_backward_args> passed_backward;

  size_t message_size = 0;
  uint8_t cut = 0;  // of the rows into tiles

  const Operand& written_out() const { return is_update() ? parts[0].output : out; }
  const Operand& written_lse() const { return is_update() ? parts[0].lse : out_lse; }
  // Whose shape the merge has.
  const Operand& reference() const { return parts[is_update()].output; }
  // Of this entry, given or not.
  std::vector<Operand*> operands();
  std::vector<const Operand*> operands() const;
  std::vector<const Operand*> written() const;
  void pass_structs();

  bool is_update() const { return entry == Entry::kUpdate; }
  bool is_backward() const { return entry == Entry::kBackward; }
  int stack_dim() const { return is_stack ? args.stack_dim : -1; }
  int base_of(int k) const { return is_update() ? update.lse_base : part(k).part.lse_base; }
  int out_base() const { return is_update() ? update.lse_base : args.out_lse_base; }
  bool inverts_empty() const { return is_update() ? update.invert_empty : args.invert_empty; }
  const FuzzedPart& part(int k) const { return parts[is_stack ? 0 : k % parts.size()]; }
  // Of a described call.
  int row_dims() const { return reference().view.rank - 1 - is_stack; }
  std::vector<int64_t> shape() const;  // of the merge
  View output_of(int k) const {
    return View(regions, part(k).output, part(k).output.view.rank, stack_dim(), k);
  }
  View lse_of(int k) const {
    return View(regions, part(k).lse, row_dims() + is_stack, stack_dim(), k);
  }
};

// The part's row for row `place` of the merge; -1: none.
int64_t row_at(const CallOfParts& call, const FuzzedPart& part, int64_t place);

}  // namespace merge_attn_states::fuzz
