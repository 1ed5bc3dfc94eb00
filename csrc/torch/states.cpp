// Torch's side of many parts: their schemas, and the way from the dispatcher's stack to the C
// entry. As ops.cpp it decides nothing; here stands only what the C entry cannot be told: lists of
// different lengths, and names of bases.
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>
#include <string>
#include <vector>

#include "../core/part_operands.h"
#include "outcome.h"
#include "stable_tensor.h"

namespace merge_attn_states {
namespace {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
using torch::stable::detail::from;
using torch::stable::detail::to;

using OptionalTensor = std::optional<Tensor>;
using OptionalTensors = std::vector<OptionalTensor>;  // one a part, or none at all

// Lists of optional tensors have no default: where they may be left out, the dispatcher does not
// look at their tensors.
constexpr const char* kParts =
    "Tensor[] outputs, Tensor[] lses, Tensor?[] index, Tensor?[] empty, int? dim=None, "
    "Tensor? sink=None, str lse_base=\"e\", str? out_lse_base=None, ";

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

// Takes the dispatcher's arguments one after the other.
class Stack {
 public:
  explicit Stack(StableIValue* stack) : next_(stack) {}
  template <class T>
  T take() {
    return to<T>(*next_++);
  }
  std::string take_string() { return to_string(*next_++); }
  std::optional<std::string> take_optional_string() { return to_optional_string(*next_++); }

 private:
  StableIValue* next_;
};

bool is_given(const OptionalTensor& tensor) { return tensor.has_value() && tensor->defined(); }

// A tensor and what the C entry's struct says of it.
struct Operand {
  OptionalTensor tensor;
  TensorView view{};

  void describe(Name name, bool written) {
    if (!is_given(tensor)) return;
    if (!merge_attn_states::describe(tensor->get(), written, view)) {
      throw std::runtime_error(name.str() +
                               ": expected a tensor with memory and strides, got one that PyTorch "
                               "describes otherwise");
    }
  }
  const TensorView* get() const { return is_given(tensor) ? &view : nullptr; }
};

int32_t base_of(char letter, Name name, const std::string& given) {
  if (letter == 'e') return MERGE_ATTN_STATES_BASE_E;
  if (letter == '2') return MERGE_ATTN_STATES_BASE_2;
  refuse(name, [&] { return "expected the base \"e\" or \"2\", got \"" + given + "\""; });
}

// What both forms of merge_states take.
struct Parts {
  std::vector<Tensor> outputs, lses;
  OptionalTensors index, empty;
  std::optional<int64_t> dim;
  Operand sink;
  std::string lse_base;
  std::optional<std::string> out_lse_base;

  explicit Parts(Stack& stack)
      : outputs(stack.take<std::vector<Tensor>>()),
        lses(stack.take<std::vector<Tensor>>()),
        index(stack.take<OptionalTensors>()),
        empty(stack.take<OptionalTensors>()),
        dim(stack.take<std::optional<int64_t>>()),
        sink{stack.take<OptionalTensor>()},
        lse_base(stack.take_string()),
        out_lse_base(stack.take_optional_string()) {}
};

// One call of merge_states, alive as long as the args that point into it. A stack whose parts have
// an index or a mask each becomes a list of its parts.
class MergeStates {
 public:
  MergeStates(Parts parts, OptionalTensor out, OptionalTensor out_lse, OptionalTensor scale,
              bool invert_empty)
      : given_(std::move(parts)),
        out_{std::move(out)},
        out_lse_{std::move(out_lse)},
        scale_{std::move(scale)},
        invert_empty_(invert_empty) {
    out_.describe("out", true);
    out_lse_.describe("out_lse", true);
    describe_parts();
    scale_.describe("out_scale", false);
    given_.sink.describe("sink", false);
  }
  MergeStates(const MergeStates&) = delete;

  merge_attn_states_parts_args args() const {
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

  int64_t num_parts() const {
    return is_stack_ ? given_.outputs[0].size(*given_.dim) : parts_.size();
  }

  std::vector<Tensor> written() const {
    std::vector<Tensor> tensors = {*out_.tensor};
    if (is_given(out_lse_.tensor)) tensors.push_back(*out_lse_.tensor);
    return tensors;
  }

 private:
  struct OfPart {
    Operand output, lse, empty, index;
    std::vector<int64_t> sizes;  // of a stack's part: the output's, its strides, the LSE's
  };

  void describe_parts() {
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
               std::to_string(given_.outputs[0].dim() - 2) + "], got " +
               std::to_string(*given_.dim);
      });
    }
    // A stack that cannot be told apart stays one: what is wrong with it is for the C entry to say.
    const bool has_own =
        !given_.index.empty() || !given_.empty.empty() || given_.lse_base.size() > 1;
    is_stack_ = given_.dim.has_value() && !(has_own && can_unstack());
    if (given_.dim.has_value() && !is_stack_) {
      unstack();
    } else {
      parts_.resize(listed);
      for (size_t k = 0; k < listed; ++k) {
        parts_[k].output.tensor = given_.outputs[k];
        parts_[k].lse.tensor = given_.lses[k];
        parts_[k].output.describe({"outputs", number(k)}, false);
        parts_[k].lse.describe({"lses", number(k)}, false);
      }
    }
    if (!is_stack_) {
      distribute(given_.index, &OfPart::index, "index");
      distribute(given_.empty, &OfPart::empty, "empty");
    }
    describe_bases();
    for (size_t k = 0; k < parts_.size(); ++k) pointers_.push_back(&structs_[k]);
  }

  int32_t number(size_t k) const { return given_.dim.has_value() ? -1 : static_cast<int32_t>(k); }

  // Whether each part of the stack can be told apart.
  bool can_unstack() const {
    const int64_t dim = *given_.dim;
    const Tensor &outputs = given_.outputs[0], &lses = given_.lses[0];
    return dim >= 0 && dim < outputs.dim() - 1 && dim < lses.dim() &&
           outputs.size(dim) == lses.size(dim);
  }

  void unstack() {
    const auto dim = static_cast<int>(*given_.dim);
    Operand stacks[2] = {{given_.outputs[0]}, {given_.lses[0]}};
    stacks[0].describe("outputs", false);
    stacks[1].describe("lses", false);
    parts_.resize(given_.outputs[0].size(dim));
    for (size_t k = 0; k < parts_.size(); ++k) {
      std::vector<int64_t>& numbers = parts_[k].sizes;
      for (const Operand& stack : stacks) {
        for (const int64_t* of : {stack.view.sizes, stack.view.strides}) {
          for (int i = 0; i < stack.view.rank; ++i) {
            if (i != dim) numbers.push_back(of[i]);
          }
        }
      }
      const int64_t* next = numbers.data();
      for (auto [operand, stack] :
           {std::pair(&parts_[k].output, &stacks[0]), std::pair(&parts_[k].lse, &stacks[1])}) {
        operand->tensor = stack->tensor;
        operand->view = stack->view;
        TensorView& view = operand->view;
        view.rank = stack->view.rank - 1;
        view.sizes = next;
        view.strides = next + view.rank;
        next += 2 * view.rank;
        const int64_t bytes = size_of(static_cast<DType>(view.dtype));
        view.data = static_cast<char*>(view.data) +
                    static_cast<int64_t>(k) * stack->view.strides[dim] * bytes;
      }
    }
  }

  void distribute(OptionalTensors& given, Operand OfPart::*which, const char* name) {
    if (given.empty()) return;
    if (given.size() != parts_.size()) {
      refuse(name, [&] {
        return "expected a tensor or None for each of " + std::to_string(parts_.size()) +
               " parts, got " + std::to_string(given.size());
      });
    }
    for (size_t k = 0; k < parts_.size(); ++k) {
      Operand& operand = parts_[k].*which;
      operand.tensor = std::move(given[k]);
      operand.describe({name, static_cast<int32_t>(k)}, false);
    }
  }

  void describe_bases() {
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
      const OfPart& part = parts_[k];
      structs_[k] = {.struct_size = sizeof(merge_attn_states_part),
                     .output = part.output.get(),
                     .lse = part.lse.get(),
                     .empty = part.empty.get(),
                     .index = part.index.get(),
                     .lse_base = base_of(bases[bases.size() == 1 ? 0 : k], "lse_base", bases),
                     .reserved = 0};
      are_mixed |= structs_[k].lse_base != structs_[0].lse_base;
    }
    if (const auto& base = given_.out_lse_base) {
      out_base_ = base_of(base->size() == 1 ? (*base)[0] : '\0', "out_lse_base", *base);
    } else if (are_mixed && (is_given(out_lse_.tensor) || is_given(given_.sink.tensor))) {
      refuse("out_lse_base", [] {
        return "expected \"e\" or \"2\" where the bases of the parts differ, got none";
      });
    } else if (count > 0 && !are_mixed) {
      out_base_ = structs_[0].lse_base;
    }
  }

  Parts given_;
  Operand out_, out_lse_, scale_;
  bool invert_empty_;
  bool is_stack_ = false;
  int32_t out_base_ = MERGE_ATTN_STATES_BASE_E;
  std::vector<OfPart> parts_;
  std::vector<merge_attn_states_part> structs_;
  std::vector<const merge_attn_states_part*> pointers_;
};

class UpdateState {
 public:
  explicit UpdateState(Stack& stack) {
    for (Operand* operand : {&out_, &lse_, &block_out_, &block_lse_}) {
      operand->tensor = stack.take<Tensor>();
    }
    for (Operand* operand : {&index_, &empty_}) operand->tensor = stack.take<OptionalTensor>();
    base_ = stack.take_string();
    invert_empty_ = stack.take<bool>();
    out_.describe("out", true);
    lse_.describe("lse", true);
    block_out_.describe("block_out", false);
    block_lse_.describe("block_lse", false);
    index_.describe("index", false);
    empty_.describe("empty", false);
  }
  UpdateState(const UpdateState&) = delete;

  merge_attn_states_update_args args() const {
    return {.struct_size = sizeof(merge_attn_states_update_args),
            .out = out_.get(),
            .lse = lse_.get(),
            .block_out = block_out_.get(),
            .block_lse = block_lse_.get(),
            .index = index_.get(),
            .empty = empty_.get(),
            .stream = nullptr,
            .lse_base = base_of(base_.size() == 1 ? base_[0] : '\0', "lse_base", base_),
            .invert_empty = invert_empty_,
            .dependent_launch = 0,
            .reserved = 0};
  }

  std::vector<Tensor> written() const { return {*out_.tensor, *lse_.tensor}; }

 private:
  Operand out_, lse_, block_out_, block_lse_, index_, empty_;
  std::string base_;
  bool invert_empty_;
};

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
std::vector<int64_t> result_shape(const Parts& parts) {
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

ScalarType result_dtype(const Parts& parts) {
  const ScalarType first = parts.outputs[0].scalar_type();
  for (const Tensor& output : parts.outputs) {
    if (output.scalar_type() != first) return ScalarType::Float;
  }
  return first;
}

struct Results {
  OptionalTensor out, lse;
};

Results new_results(const Parts& parts, std::optional<ScalarType> dtype, bool wants_lse,
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
  Parts parts(stack);
  const auto dtype = stack.take<std::optional<ScalarType>>();
  auto scale = stack.take<OptionalTensor>();
  const bool wants_lse = stack.take<bool>(), invert_empty = stack.take<bool>();
  Results results = new_results(parts, dtype, wants_lse, is_given(scale));
  const MergeStates call(std::move(parts), results.out, results.lse, std::move(scale),
                         invert_empty);
  run(call.args());
  if (!wants_lse) results.lse = torch::stable::new_empty(*results.out, {0}, ScalarType::Float);
  values[0] = from(*results.out);
  values[1] = from(*results.lse);
}

// The gradients of outputs, LSEs and sink: of all parts in one tensor, and of each row's sink.
void merge_states_backward(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  Operand grad_out{stack.take<Tensor>()}, grad_out_lse{stack.take<OptionalTensor>()};
  Parts parts(stack);
  const bool invert_empty = stack.take<bool>();
  const bool has_sink = is_given(parts.sink.tensor);
  const Tensor first = parts.outputs.at(0);
  const ScalarType dtype = result_dtype(parts);
  const ScalarType wide = dtype == ScalarType::Double ? dtype : ScalarType::Float;
  std::vector<int64_t> shape = result_shape(parts);
  const MergeStates call(std::move(parts), std::nullopt, std::nullopt, std::nullopt, invert_empty);

  shape.insert(shape.begin(), call.num_parts());
  Operand outputs{torch::stable::new_empty(first, shape, dtype)};
  shape.pop_back();
  Operand lses{torch::stable::new_empty(first, shape, wide)};
  shape.erase(shape.begin());
  if (!has_sink) shape = {0};
  Operand sink{torch::stable::new_empty(first, shape, wide)};
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

MergeStates merge_states_out_call(StableIValue* values) {
  Stack stack(values);
  auto out = stack.take<Tensor>();
  auto out_lse = stack.take<OptionalTensor>();
  Parts parts(stack);
  auto scale = stack.take<OptionalTensor>();
  const bool invert_empty = stack.take<bool>();
  return MergeStates(std::move(parts), std::move(out), std::move(out_lse), std::move(scale),
                     invert_empty);
}

void merge_states_out(StableIValue* values, uint64_t, uint64_t) {
  run(merge_states_out_call(values).args());
}

void update_state(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  run(UpdateState(stack).args());
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
  const MergeStates call = merge_states_out_call(values);
  expect_legal(call.args());
  std::vector<Tensor> fresh;
  for (const Tensor& tensor : call.written()) fresh.push_back(torch::stable::empty_like(tensor));
  values[0] = from(fresh);
}

void fresh_update_state(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  const UpdateState call(stack);
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
  Parts parts(stack);
  const auto dtype = stack.take<std::optional<ScalarType>>();
  auto scale = stack.take<OptionalTensor>();
  const bool wants_lse = stack.take<bool>(), invert_empty = stack.take<bool>();
  inspect(values, [&](auto& selection, Message& message) {
    if (!is_given(out)) {
      Results results = new_results(parts, dtype, wants_lse, is_given(scale));
      out = results.out;
      out_lse = results.lse;
    }
    const MergeStates call(std::move(parts), std::move(out), std::move(out_lse), std::move(scale),
                           invert_empty);
    return select(call.args(), selection, message);
  });
}

void inspect_update_state(StableIValue* values, uint64_t, uint64_t) {
  Stack stack(values);
  inspect(values, [&](auto& selection, Message& message) {
    return select(UpdateState(stack).args(), selection, message);
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
