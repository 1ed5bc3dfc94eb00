// A fuzz input read as one call of the pair's entry.
//
// Zero bytes give an ordinary call, so that what a mutation changes is
// one property of a call that is otherwise legal.
#pragma once

#include "operand.h"

namespace merge_attn_states::fuzz {

enum Role {
  kPrefixOutput,
  kSuffixOutput,
  kPrefixLse,
  kSuffixLse,
  kOutputScale,
  kOutput,
  kOutputLse,
  kRoles
};

inline constexpr const char* kNames[kRoles] = {"prefix_output", "suffix_output", "prefix_lse",
                                               "suffix_lse",    "output_scale",  "output",
                                               "output_lse"};

struct Call {
  Call(const uint8_t* data, size_t size);
  Call(const Call&) = delete;  // args points into operands

  Regions regions;  // [0] is shared, each other belongs to one operand at first
  Operand operands[kRoles];
  merge_attn_states_args args{};  // what the library must see of what is passed
  Passed<merge_attn_states_args> passed;
  size_t selection_size = sizeof(merge_attn_states_selection);
  size_t message_size = 0;
  bool on_cuda = false;

  const merge_attn_states_tensor& view(Role role) const { return operands[role].view; }
};

}  // namespace merge_attn_states::fuzz
