// The operators of many parts: their schemas, and from their arguments to the C entry and back. As
// ops.cpp it decides nothing.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <cstdio>
#include <optional>
#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../core/part_operands.h"
#include "outcome.h"
#include "stable_tensor.h"
#include "states_arguments.h"

namespace merge_attn_states {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

// Lists of optional tensors have no default: where they may be left out, the dispatcher does not
// look at their tensors.
constexpr const char* kParts =
    "Tensor[] outputs, Tensor[] lses, Tensor?[] index, Tensor?[] empty, int? dim=None, "
    "Tensor? sink=None, str lse_base=\"e\", str? out_lse_base=None, ";

void run(merge_attn_states_parts_args args) {
  if (args.out != nullptr) args.stream = current_stream(*args.out);
  Message message;
  expect_ok(merge_attn_states_merge_parts(&args, message.text, sizeof(message.text)), message);
}

void run(merge_attn_states_update_args args) {
  if (args.out != nullptr) args.stream = current_stream(*args.out);
  Message message;
  expect_ok(merge_attn_states_update(&args, message.text, sizeof(message.text)), message);
}

// The shape of the result, as far as the operands have one; what is wrong with them is for the C
// entry to say.
std::vector<int64_t> result_shape(const PartsArguments& parts) {
  std::vector<int64_t> shape;
  if (parts.outputs.empty() || !parts.outputs[0].defined()) return shape;
  const Tensor& first = parts.outputs[0];
  for (int64_t i = 0; i < first.dim(); ++i) {
    if (i != parts.dim.value_or(-1)) shape.push_back(first.size(i));
  }
  const bool is_gathered =
      !parts.index.empty() && is_given(parts.index.front()) && parts.index.front()->dim() == 1;
  if (is_gathered && !shape.empty()) shape[0] = parts.index.front()->size(0);
  return shape;
}

ScalarType result_dtype(const PartsArguments& parts) {
  const ScalarType first = parts.outputs[0].scalar_type();
  for (const Tensor& output : parts.outputs) {
    if (output.scalar_type() != first) return ScalarType::Float;
  }
  return first;
}

struct Results {
  OptionalTensor out, lse;
};

Results new_results(const PartsArguments& parts, std::optional<ScalarType> dtype, bool wants_lse,
                    bool has_scale) {
  if (parts.outputs.empty()) return {};
  if (dtype.has_value()) {  // it is known by another name than the result
    const auto as_dlpack = [](ScalarType type) {
      return static_cast<DType>(dlpack_dtype(to<int32_t>(from(type))));
    };
    const DType of_parts = as_dlpack(parts.outputs[0].scalar_type());
    if (is_supported(of_parts)) {
      check_out_dtype("out_dtype", as_dlpack(*dtype), of_parts, has_scale);
    }
  }
  const std::vector<int64_t> shape = result_shape(parts);
  const Tensor& first = parts.outputs[0];
  const std::vector<int64_t> lse_shape(shape.begin(),
                                       shape.empty() ? shape.end() : shape.end() - 1);
  const ScalarType lse_dtype =
      first.scalar_type() == ScalarType::Double ? ScalarType::Double : ScalarType::Float;
  Results results;
  results.out = torch::stable::new_empty(first, shape, dtype.value_or(result_dtype(parts)));
  if (wants_lse) results.lse = torch::stable::new_empty(first, lse_shape, lse_dtype);
  return results;
}

void merge_states(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  PartsArguments parts(stack);
  const auto dtype = stack.take<std::optional<ScalarType>>();
  auto scale = stack.take<OptionalTensor>();
  const bool wants_lse = stack.take<bool>(), invert_empty = stack.take<bool>();
  Results results = new_results(parts, dtype, wants_lse, is_given(scale));
  const MergeStatesCall call(std::move(parts), results.out, results.lse, std::move(scale),
                             invert_empty);
  run(call.args());
  if (!wants_lse) results.lse = torch::stable::new_empty(*results.out, {0}, ScalarType::Float);
  values[0] = from(*results.out);
  values[1] = from(*results.lse);
}

// The gradients of outputs, LSEs and sink: of all parts in one tensor, and of each row's sink.
void merge_states_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  TensorArgument grad_out{stack.take<Tensor>()}, grad_out_lse{stack.take<OptionalTensor>()};
  PartsArguments parts(stack);
  const bool invert_empty = stack.take<bool>();
  const bool has_sink = is_given(parts.sink.tensor);
  if (parts.outputs.empty()) refuse("outputs", [] { return "expected one part or more, got 0"; });
  const Tensor first = parts.outputs[0];
  const ScalarType dtype = result_dtype(parts);
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  std::vector<int64_t> shape = result_shape(parts);
  const MergeStatesCall call(std::move(parts), std::nullopt, std::nullopt, std::nullopt,
                             invert_empty);

  shape.insert(shape.begin(), call.num_parts());
  TensorArgument outputs{torch::stable::new_empty(first, shape, dtype)};
  shape.pop_back();
  TensorArgument lses{torch::stable::new_empty(first, shape, wide)};
  shape.erase(shape.begin());
  if (!has_sink) shape = {0};
  TensorArgument sink{torch::stable::new_empty(first, shape, wide)};
  grad_out.describe("grad_out", false);
  grad_out_lse.describe("grad_out_lse", false);
  outputs.describe("grad_outputs", true);
  lses.describe("grad_lses", true);
  sink.describe("grad_sink", true);

  merge_attn_states_parts_args forward = call.args();
  forward.stream = current_stream(grad_out.view);
  const merge_attn_states_backward_args args{.struct_size = sizeof(args),
                                             .forward = &forward,
                                             .grad_out = grad_out.get(),
                                             .grad_out_lse = grad_out_lse.get(),
                                             .grad_outputs = outputs.get(),
                                             .grad_lses = lses.get(),
                                             .grad_sink = has_sink ? sink.get() : nullptr};
  Message message;
  expect_ok(merge_attn_states_backward(&args, message.text, sizeof(message.text)), message);
  values[0] = from(*outputs.tensor);
  values[1] = from(*lses.tensor);
  values[2] = from(*sink.tensor);
}

MergeStatesCall merge_states_out_call(StableIValue* values) {
  Stack stack(values);
  auto out = stack.take<Tensor>();
  auto out_lse = stack.take<OptionalTensor>();
  PartsArguments parts(stack);
  auto scale = stack.take<OptionalTensor>();
  const bool invert_empty = stack.take<bool>();
  return MergeStatesCall(std::move(parts), std::move(out), std::move(out_lse), std::move(scale),
                         invert_empty);
}

void merge_states_out(StableIValue* values, uint64_t, uint64_t) {
  run(merge_states_out_call(values).args());
}

void update_state(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  run(UpdateStateCall(stack).args());
}

merge_attn_states_status select(const merge_attn_states_parts_args& args,
                                merge_attn_states_selection& selection, Message& message) {
  return merge_attn_states_select_parts(&args, &selection, message.text, sizeof(message.text));
}

merge_attn_states_status select(const merge_attn_states_update_args& args,
                                merge_attn_states_selection& selection, Message& message) {
  return merge_attn_states_select_update(&args, &selection, message.text, sizeof(message.text));
}

// As fresh_outputs in ops.cpp: compiled code in grad mode merges into what these return, and
// copies.
template <class Args>
void expect_legal(const Args& args) {
  merge_attn_states_selection selection{.struct_size = sizeof(selection)};
  Message message;
  expect_ok(select(args, selection, message), message);
}

void fresh_merge_states(StableIValue* values, uint64_t, uint64_t) {
  const MergeStatesCall call = merge_states_out_call(values);
  expect_legal(call.args());
  std::vector<Tensor> fresh;
  for (const Tensor& tensor : call.written()) fresh.push_back(torch::stable::empty_like(tensor));
  values[0] = from(fresh);
}

void fresh_update_state(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const UpdateStateCall call(stack);
  expect_legal(call.args());
  std::vector<Tensor> fresh;
  for (const Tensor& tensor : call.written()) fresh.push_back(torch::stable::clone(tensor));
  values[0] = from(fresh);
}

// What a call would do, as numbers and texts: a status and its sentence, or the kernel that runs.
template <class F>
void inspect(StableIValue* values, const F& select) {
  merge_attn_states_selection selection{.struct_size = sizeof(selection)};
  Message message;
  merge_attn_states_status status;
  try {
    status = select(selection, message);
  } catch (const std::invalid_argument& error) {
    status = MERGE_ATTN_STATES_INVALID_ARGUMENT;
    std::snprintf(message.text, sizeof(message.text), "%s", error.what());
  }
  values[0] = from(static_cast<int64_t>(status));
  values[1] = from(std::string(message.text));
  values[2] = from(std::string(selection.kernel));
  values[3] = from(std::string(selection.variant));
}

void inspect_merge_states(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  auto out = stack.take<OptionalTensor>(), out_lse = stack.take<OptionalTensor>();
  PartsArguments parts(stack);
  const auto dtype = stack.take<std::optional<ScalarType>>();
  auto scale = stack.take<OptionalTensor>();
  const bool wants_lse = stack.take<bool>(), invert_empty = stack.take<bool>();
  inspect(values, [&](auto& selection, Message& message) {
    if (!is_given(out)) {
      Results results = new_results(parts, dtype, wants_lse, is_given(scale));
      out = results.out;
      out_lse = results.lse;
    }
    const MergeStatesCall call(std::move(parts), std::move(out), std::move(out_lse),
                               std::move(scale), invert_empty);
    return select(call.args(), selection, message);
  });
}

void inspect_update_state(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  inspect(values, [&](auto& selection, Message& message) {
    return select(UpdateStateCall(stack).args(), selection, message);
  });
}

void implement_states(torch::stable::detail::StableLibrary& library) {
  library.impl("merge_states", &merge_states);
  library.impl("merge_states_backward", &merge_states_backward);
  library.impl("merge_states_out", &merge_states_out);
  library.impl("update_state", &update_state);
  library.impl("fresh_merge_states", &fresh_merge_states);
  library.impl("fresh_update_state", &fresh_update_state);
  library.impl("inspect_merge_states", &inspect_merge_states);
  library.impl("inspect_update_state", &inspect_update_state);
}

}  // namespace
}  // namespace merge_attn_states

STABLE_TORCH_LIBRARY_FRAGMENT(merge_attn_states, m) {
  const std::string parts = merge_attn_states::kParts;
  const std::string result =
      "ScalarType? out_dtype=None, Tensor? out_scale=None, bool return_lse=True, "
      "bool invert_empty=False)";
  const std::string update =
      "Tensor block_out, Tensor block_lse, Tensor? index=None, Tensor? empty=None, "
      "str lse_base=\"e\", bool invert_empty=False)";
  const std::string into = parts + "Tensor? out_scale=None, bool invert_empty=False)";
  const auto define = [&](const std::string& schema) { m.def(schema.c_str()); };
  define("merge_states(" + parts + result + " -> (Tensor, Tensor)");
  define("merge_states_backward(Tensor grad_out, Tensor? grad_out_lse, " + parts +
         "bool invert_empty=False) -> (Tensor, Tensor, Tensor)");
  define("merge_states_out(Tensor(a!) out, Tensor(b!)? out_lse, " + into + " -> ()");
  define("update_state(Tensor(a!) out, Tensor(b!) lse, " + update + " -> ()");
  define("fresh_merge_states(Tensor out, Tensor? out_lse, " + into + " -> Tensor[]");
  define("fresh_update_state(Tensor out, Tensor lse, " + update + " -> Tensor[]");
  define("inspect_merge_states(Tensor? out, Tensor? out_lse, " + parts + result +
         " -> (int, str, str, str)");
  define("inspect_update_state(Tensor out, Tensor lse, " + update + " -> (int, str, str, str)");
}

STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CPU, m) { merge_attn_states::implement_states(m); }
STABLE_TORCH_LIBRARY_IMPL(merge_attn_states, CUDA, m) { merge_attn_states::implement_states(m); }
