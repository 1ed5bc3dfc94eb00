// Torch's side: every schema, and the way from the dispatcher's stack to the C entry. Decides
// nothing.
//
// Only PyTorch's stable ABI is used, so that one build serves every release from 2.11 on, and no
// symbol of libtorch_cuda is named, so that a CPU-only PyTorch loads the library too.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <array>
#include <optional>
#include <string>
#include <vector>

#include "arguments.h"
#include "outcome.h"
#include "stable_tensor.h"
#include "tensor_argument.h"

namespace merge_attn_states {
namespace {

using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// "(Tensor(a!) output, Tensor prefix_output, ...)": the table of operands as a schema has it.
// SymInt?, because with int? torch.compile specialises on every count; a kernel gets an int64_t.
std::string schema_arguments(bool writes) {
  std::string text;
  char alias = 'a';
  for (int i = 0; i < kNumOperands; ++i) {
    const OperandSpec& spec = kOperands[i];
    if (i == kCountPosition) text += std::string(", SymInt? ") + kCountName + "=None";
    text += text.empty() ? "(Tensor" : ", Tensor";
    if (spec.written && writes) text += std::string("(") + alias++ + "!)";
    text += std::string(spec.optional ? "? " : " ") + spec.name + (spec.optional ? "=None" : "");
  }
  return text + ")";
}

// The operands of one call, alive as long as the args that point at them.
class Call {
 public:
  // Takes what the dispatcher left on the stack.
  explicit Call(const StableIValue* stack)
      : count_(to<std::optional<int64_t>>(stack[kCountPosition])) {
    for (int i = 0; i < kNumOperands; ++i) {
      const StableIValue value = stack[position(i)];
      operands_[i].tensor = kOperands[i].optional ? to<OptionalTensor>(value) : to<Tensor>(value);
    }
    for (const bool written : {true, false}) {
      for (int i = 0; i < kNumOperands; ++i) {
        if (kOperands[i].written == written) operands_[i].describe(kOperands[i].name, written);
      }
    }
  }

  merge_attn_states_args args() const {
    merge_attn_states_args args{.struct_size = sizeof(args)};
    for (int i = 0; i < kNumOperands; ++i) args.*kOperands[i].field = operands_[i].get();
    args.prefill_tokens_with_context = count_.value_or(0);
    args.has_prefill_tokens_with_context = count_.has_value();
    return args;
  }

  std::vector<Tensor> written() const {
    std::vector<Tensor> tensors;
    for (int i = 0; i < kNumOperands; ++i) {
      const OptionalTensor& tensor = operands_[i].tensor;
      if (kOperands[i].written && is_given(tensor)) tensors.push_back(*tensor);
    }
    return tensors;
  }

 private:
  std::optional<int64_t> count_;
  std::array<TensorArgument, kNumOperands> operands_;
};

void merge(StableIValue* stack, uint64_t, uint64_t) {
  const Call call(stack);
  merge_attn_states_args args = call.args();
  if (args.output != nullptr) args.stream = current_stream(*args.output);
  Message message;
  expect_ok(merge_attn_states_merge(&args, message.text, sizeof(message.text)), message);
}

merge_attn_states_status select(const Call& call, merge_attn_states_selection& selection,
                                Message& message) {
  const merge_attn_states_args args = call.args();  // no stream: nothing is launched
  selection.struct_size = sizeof(selection);
  return merge_attn_states_select(&args, &selection, message.text, sizeof(message.text));
}

// What would run; throws what is wrong with the call.
merge_attn_states_selection selected(const Call& call) {
  merge_attn_states_selection selection;
  Message message;
  expect_ok(select(call, selection, message), message);
  return selection;
}

void selected_kernel(StableIValue* stack, uint64_t, uint64_t) {
  const merge_attn_states_selection selection = selected(Call(stack));
  stack[0] = from(std::string(selection.kernel));
  stack[1] = from(std::string(selection.variant));
}

// What is wrong with a call, as a status and its sentence: a caller that has to tell them apart
// cannot go by the type of an exception, which depends on PyTorch's version.
void check(StableIValue* stack, uint64_t, uint64_t) {
  merge_attn_states_selection selection;
  Message message;
  const merge_attn_states_status status = select(Call(stack), selection, message);
  stack[0] = from(static_cast<int64_t>(status));
  stack[1] = from(std::string(message.text));
}

// Compiled code in grad mode merges into these and copies; what is wrong with the operands that it
// copies to would not be seen behind them.
void fresh_outputs(StableIValue* stack, uint64_t, uint64_t) {
  const Call call(stack);
  selected(call);
  std::vector<Tensor> fresh;
  for (const Tensor& tensor : call.written()) fresh.push_back(torch::stable::empty_like(tensor));
  stack[0] = from(fresh);
}

std::string build_info() { return merge_attn_states_build_info(); }

// One entry an op, the same for every device: the border is where devices part.
void implement(torch::stable::detail::StableLibrary& library) {
  library.impl("merge_attn_states", &merge);
  library.impl("selected_kernel", &selected_kernel);
  library.impl("check", &check);
  library.impl("fresh_outputs", &fresh_outputs);
}

}  // namespace
}  // namespace merge_attn_states

STABLE_TORCH_LIBRARY(merge_attn_states, m) {
  using merge_attn_states::schema_arguments;
  m.def(("merge_attn_states" + schema_arguments(true) + " -> ()").c_str());
  m.def(("selected_kernel" + schema_arguments(false) + " -> (str, str)").c_str());
  m.def(("check" + schema_arguments(false) + " -> (int, str)").c_str());
  m.def(("fresh_outputs" + schema_arguments(false) + " -> Tensor[]").c_str());
  m.def("build_info() -> str");
}

STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CPU, m) { merge_attn_states::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CUDA, m) { merge_attn_states::implement(m); }
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CompositeImplicitAutograd, m) {
  m.impl("build_info", TORCH_BOX(&merge_attn_states::build_info));
}
