#include "states_arguments.h"

#include <string_view>
#include <utility>

#include "../core/parts_call.h"
#include "../core/stack.h"
#include "lse_bases.h"

namespace merge_attn_states {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// PyTorch's own conversion never frees its string.
std::string to_string(StableIValue value) {
  const auto handle = to<StringHandle>(value);
  size_t length = 0;
  const char* text = nullptr;
  torch_string_length(handle, &length);
  torch_string_c_str(handle, &text);
  std::string result(text, length);
  torch_delete_string(handle);
  return result;
}

std::optional<std::string> to_optional_string(StableIValue value) {
  if (value == from(std::nullopt)) return std::nullopt;
  auto* const inner = to<StableIValue*>(value);
  std::string result = to_string(*inner);
  delete inner;
  return result;
}

int32_t base_of(std::string_view letter, Name name, const std::string& given) {
  int32_t base;
  if (read_base(letter, base)) return base;
  refuse(name, [&] { return "expected the base \"e\" or \"2\", got \"" + given + "\""; });
}

}  // namespace

std::string Stack::take_string() { return to_string(*next_++); }

std::optional<std::string> Stack::take_optional_string() { return to_optional_string(*next_++); }

PartsArguments::PartsArguments(Stack& stack)
    : outputs(stack.take<std::vector<Tensor>>()),
      lses(stack.take<std::vector<Tensor>>()),
      index(stack.take<OptionalTensors>()),
      empty(stack.take<OptionalTensors>()),
      dim(stack.take<std::optional<int64_t>>()),
      sink{stack.take<OptionalTensor>()},
      lse_base(stack.take_string()),
      out_lse_base(stack.take_optional_string()) {}

MergeStatesCall::MergeStatesCall(PartsArguments parts, OptionalTensor out, OptionalTensor out_lse,
                                 OptionalTensor scale, bool invert_empty)
    : given_(std::move(parts)),
      out_{std::move(out)},
      out_lse_{std::move(out_lse)},
      scale_{std::move(scale)},
      invert_empty_(invert_empty) {
  // Results first: see stable_tensor.h.
  out_.describe("out", true);
  out_lse_.describe("out_lse", true);
  describe_parts();
  scale_.describe("out_scale", false);
  given_.sink.describe("sink", false);
}

merge_attn_states_parts_args MergeStatesCall::args() const {
  return {.struct_size = sizeof(merge_attn_states_parts_args),
          .out = out_.get(),
          .out_lse = out_lse_.get(),
          .parts = pointers_.data(),
          .num_parts = static_cast<int32_t>(pointers_.size()),
          .out_lse_base = out_base_,
          .is_stack = is_stack_,
          .stack_dim = is_stack_ ? static_cast<int32_t>(*given_.dim) : 0,
          .sink = given_.sink.get(),
          .out_scale = scale_.get(),
          .stream = nullptr,
          .invert_empty = invert_empty_,
          .dependent_launch = 0};
}

int64_t MergeStatesCall::num_parts() const {
  if (!is_stack_) return parts_.size();
  const int64_t dim = *given_.dim;  // what it may be is for the C entry to say
  return dim >= 0 && dim < given_.outputs[0].dim() ? given_.outputs[0].size(dim) : 0;
}

std::vector<Tensor> MergeStatesCall::written() const {
  std::vector<Tensor> tensors = {*out_.tensor};
  if (is_given(out_lse_.tensor)) tensors.push_back(*out_lse_.tensor);
  return tensors;
}

void MergeStatesCall::check_lists() const {
  const size_t listed = given_.outputs.size();
  if (given_.lses.size() != listed) {
    refuse("lses", [&] {
      return "expected " + std::to_string(listed) + " tensors, as many as outputs, got " +
             std::to_string(given_.lses.size());
    });
  }
  if (given_.dim.has_value() && listed != 1) {
    refuse("outputs", [&] {
      return "expected one tensor with its parts along dim, got " + std::to_string(listed);
    });
  }
  if (given_.dim.has_value() && *given_.dim != static_cast<int32_t>(*given_.dim)) {
    refuse("dim", [&] {
      return "expected a row dimension of outputs, in [0, " +
             std::to_string(given_.outputs[0].dim() - 2) + "], got " + std::to_string(*given_.dim);
    });
  }
}

// Whether each part of the stack can be told apart, and is not one of too many.
bool MergeStatesCall::can_unstack() const {
  const int64_t dim = *given_.dim;
  const Tensor &outputs = given_.outputs[0], &lses = given_.lses[0];
  return dim >= 0 && dim < outputs.dim() - 1 && dim < lses.dim() &&
         outputs.size(dim) == lses.size(dim) && outputs.size(dim) <= kMaxAlikeParts;
}

void MergeStatesCall::describe_parts() {
  check_lists();
  // A stack that cannot be told apart stays one: what is wrong with it is for the C entry to say.
  const bool has_own = !given_.index.empty() || !given_.empty.empty() || given_.lse_base.size() > 1;
  is_stack_ = given_.dim.has_value() && !(has_own && can_unstack());
  if (given_.dim.has_value() && !is_stack_) {
    unstack();
  } else {
    list_parts();
  }
  if (!is_stack_) {
    distribute(given_.index, &PartArguments::index, "index");
    distribute(given_.empty, &PartArguments::empty, "empty");
  }
  describe_bases();
  for (const merge_attn_states_part& part : structs_) pointers_.push_back(&part);
}

void MergeStatesCall::list_parts() {
  parts_.resize(given_.outputs.size());
  for (size_t k = 0; k < parts_.size(); ++k) {
    const int32_t number = given_.dim.has_value() ? -1 : static_cast<int32_t>(k);
    parts_[k].output.tensor = given_.outputs[k];
    parts_[k].lse.tensor = given_.lses[k];
    parts_[k].output.describe({"outputs", number}, false);
    parts_[k].lse.describe({"lses", number}, false);
  }
}

void MergeStatesCall::unstack() {
  const auto dim = static_cast<int>(*given_.dim);
  TensorArgument outputs{given_.outputs[0]}, lses{given_.lses[0]};
  outputs.describe("outputs", false);
  lses.describe("lses", false);
  layout_.resize(2 * (outputs.view.rank + lses.view.rank));
  const PartsOfStack of_outputs(outputs.view, dim, layout_.data());
  const PartsOfStack of_lses(lses.view, dim, layout_.data() + 2 * outputs.view.rank);
  parts_.resize(outputs.tensor->size(dim));
  for (size_t k = 0; k < parts_.size(); ++k) {
    parts_[k].output = {outputs.tensor, of_outputs[k]};
    parts_[k].lse = {lses.tensor, of_lses[k]};
  }
}

void MergeStatesCall::distribute(OptionalTensors& given, TensorArgument PartArguments::*which,
                                 const char* name) {
  if (given.empty()) return;
  if (given.size() != parts_.size()) {
    refuse(name, [&] {
      return "expected a tensor or None for each of " + std::to_string(parts_.size()) +
             " parts, got " + std::to_string(given.size());
    });
  }
  for (size_t k = 0; k < parts_.size(); ++k) {
    TensorArgument& operand = parts_[k].*which;
    operand.tensor = std::move(given[k]);
    operand.describe({name, static_cast<int32_t>(k)}, false);
  }
}

void MergeStatesCall::describe_bases() {
  const std::string& bases = given_.lse_base;
  const size_t count = parts_.size();
  if (bases.empty() || (bases.size() != 1 && bases.size() != count && !is_stack_)) {
    refuse("lse_base", [&] {
      return "expected \"e\" or \"2\", or one of them for each of " + std::to_string(count) +
             " parts, got \"" + bases + "\"";
    });
  }
  structs_.resize(count);
  bool are_mixed = false;
  for (size_t k = 0; k < count; ++k) {
    const PartArguments& part = parts_[k];
    structs_[k] = {.struct_size = sizeof(merge_attn_states_part),
                   .output = part.output.get(),
                   .lse = part.lse.get(),
                   .empty = part.empty.get(),
                   .index = part.index.get(),
                   .lse_base = base_of(base_of_part(bases, k), "lse_base", bases),
                   .reserved = 0};
    are_mixed |= structs_[k].lse_base != structs_[0].lse_base;
  }
  if (const auto& base = given_.out_lse_base) {
    out_base_ = base_of(*base, "out_lse_base", *base);
  } else if (are_mixed && (is_given(out_lse_.tensor) || is_given(given_.sink.tensor))) {
    refuse("out_lse_base",
           [] { return "expected \"e\" or \"2\" where the bases of the parts differ, got none"; });
  } else if (count > 0 && !are_mixed) {
    out_base_ = structs_[0].lse_base;
  }
}

UpdateStateCall::UpdateStateCall(Stack& stack) {
  for (TensorArgument* operand : {&out_, &lse_, &block_out_, &block_lse_}) {
    operand->tensor = stack.take<Tensor>();
  }
  for (TensorArgument* operand : {&index_, &empty_}) operand->tensor = stack.take<OptionalTensor>();
  base_ = stack.take_string();
  invert_empty_ = stack.take<bool>();
  out_.describe("out", true);
  lse_.describe("lse", true);
  block_out_.describe("block_out", false);
  block_lse_.describe("block_lse", false);
  index_.describe("index", false);
  empty_.describe("empty", false);
}

merge_attn_states_update_args UpdateStateCall::args() const {
  return {.struct_size = sizeof(merge_attn_states_update_args),
          .out = out_.get(),
          .lse = lse_.get(),
          .block_out = block_out_.get(),
          .block_lse = block_lse_.get(),
          .index = index_.get(),
          .empty = empty_.get(),
          .stream = nullptr,
          .lse_base = base_of(base_, "lse_base", base_),
          .invert_empty = invert_empty_,
          .dependent_launch = 0,
          .reserved = 0};
}

}  // namespace merge_attn_states
