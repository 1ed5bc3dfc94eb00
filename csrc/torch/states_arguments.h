// The arguments of the operators of many parts, from the dispatcher's stack to the C entry's
// structs. As ops.cpp it decides nothing; here stands only what the C entry cannot be told: lists
// of different lengths, and names of bases.
#pragma once

#include <torch/csrc/stable/stableivalue_conversions.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdint>
#include <optional>
#include <string>
#include <vector>

#include "../core/refuse.h"
#include "tensor_argument.h"

namespace merge_attn_states {

using OptionalTensors = std::vector<OptionalTensor>;  // one a part, or none at all

// Takes the dispatcher's arguments one after the other.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return torch::stable::detail::to<T>(*next_++);
  }
  std::string take_string();
  std::optional<std::string> take_optional_string();

 private:
  StableIValue* next_;
};

// What all forms of merge_states take, in the order of their schemas.
struct PartsArguments {
  std::vector<torch::stable::Tensor> outputs, lses;
  OptionalTensors index, empty;
  std::optional<int64_t> dim;
  TensorArgument sink;
  std::string lse_base;
  std::optional<std::string> out_lse_base;

  explicit PartsArguments(Stack& stack);
};

// One call of merge_states, alive as long as the args that point into it. A stack whose parts have
// an index or a mask each becomes a list of its parts.
class MergeStatesCall {
 public:
  MergeStatesCall(PartsArguments parts, OptionalTensor out, OptionalTensor out_lse,
                  OptionalTensor scale, bool invert_empty);
  MergeStatesCall(const MergeStatesCall&) = delete;

  merge_attn_states_parts_args args() const;
  int64_t num_parts() const;
  std::vector<torch::stable::Tensor> written() const;

 private:
  struct PartArguments {
    TensorArgument output, lse, empty, index;
  };

  void check_lists() const;
  bool can_unstack() const;
  void describe_parts();
  void list_parts();
  void unstack();
  void distribute(OptionalTensors& given, TensorArgument PartArguments::*which, const char* name);
  void describe_bases();

  PartsArguments given_;
  TensorArgument out_, out_lse_, scale_;
  bool invert_empty_;
  bool is_stack_ = false;
  int32_t out_base_ = MERGE_ATTN_STATES_BASE_E;
  std::vector<int64_t> layout_;  // of the parts of a stack that was taken apart
  std::vector<PartArguments> parts_;
  std::vector<merge_attn_states_part> structs_;
  std::vector<const merge_attn_states_part*> pointers_;
};

// One call of update_state, in the same way.
class UpdateStateCall {
 public:
  explicit UpdateStateCall(Stack& stack);
  UpdateStateCall(const UpdateStateCall&) = delete;

  merge_attn_states_update_args args() const;
  std::vector<torch::stable::Tensor> written() const { return {*out_.tensor, *lse_.tensor}; }

 private:
  TensorArgument out_, lse_, block_out_, block_lse_, index_, empty_;
  std::string base_;
  bool invert_empty_;
};

}  // namespace merge_attn_states
