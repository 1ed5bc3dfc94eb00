// From what callers hand over to a validated call of many parts.
#include <algorithm>
#include <cstddef>
#include <list>

#include "part_operands.h"
#include "struct_size.h"

namespace merge_attn_states {
namespace {

static_assert(sizeof(merge_attn_states_part) ==
              offsetof(merge_attn_states_part, reserved) + sizeof(int32_t));
static_assert(sizeof(merge_attn_states_parts_args) ==
              offsetof(merge_attn_states_parts_args, dependent_launch) + sizeof(int32_t));
static_assert(sizeof(merge_attn_states_backward_args) ==
              offsetof(merge_attn_states_backward_args, grad_sink) + sizeof(void*));
static_assert(sizeof(merge_attn_states_update_args) ==
              offsetof(merge_attn_states_update_args, reserved) + sizeof(int32_t));

// Structs of other versions, in this library's form, alive as long as the operands.
class Structs {
 public:
  const TensorView* tensor(const TensorView* given, Name name) {
    return given == nullptr ? nullptr : of_this_version(given, name, kSmallestTensor, tensors_);
  }
  const merge_attn_states_part& part(const merge_attn_states_part* given, Name name) {
    return *of_this_version(given, name, sizeof(merge_attn_states_part), parts_);
  }

 private:
  template <class Struct>
  static const Struct* of_this_version(const Struct* given, Name name, size_t smallest,
                                       std::list<Struct>& storage) {
    if (given != nullptr && given->struct_size == sizeof(Struct)) return given;
    return &of_other_version(given, name, smallest, storage.emplace_back());
  }

  std::list<TensorView> tensors_;
  std::list<merge_attn_states_part> parts_;
};

Operand described(Name name, const TensorView* given, bool optional, Structs& structs) {
  Operand operand{.name = name, .view = structs.tensor(given, name)};
  if (operand.given()) {
    check_described(operand);
    operand.address_rank = operand.view->rank;
    if (std::any_of(operand.view->sizes, operand.view->sizes + operand.view->rank,
                    [](int64_t size) { return size < 0; })) {
      refuse(name, [&] { return "expected sizes of 0 or more, got " + operand.sizes(); });
    }
  } else if (!optional) {
    refuse(name, [] { return "expected a tensor, got none"; });
  }
  return operand;
}

Base checked_base(int32_t base, Name name) {
  if (base == MERGE_ATTN_STATES_BASE_E) return Base::kE;
  if (base == MERGE_ATTN_STATES_BASE_2) return Base::kTwo;
  refuse(name, [=] { return "expected the base e or 2, got number " + std::to_string(base); });
}

void check_number_of_parts(const PartsOperands& operands, bool are_alike) {
  const int limit = are_alike ? kMaxAlikeParts : kMaxParts;
  if (operands.num_parts <= limit) return;
  refuse(operands.parts[0].output.name.text, [&] {
    return "expected at most " + std::to_string(limit) + " parts" +
           (are_alike ? ""
                      : " that differ in dtype, base or strides or have an index or a mask (and " +
                            std::to_string(kMaxAlikeParts) + " that do not)") +
           ", got " + std::to_string(operands.num_parts);
  });
}

// Without an element there is no address to compute, whatever the strides; and a pointer that may
// be null, which here means "not given".
PerRow per_row(const Operand& operand, int num_row_dims, int without = -1) {
  alignas(16) static char nothing[16];
  PerRow result;
  if (!operand.given()) return result;
  result.data = operand.extent.empty() ? nothing : operand.view->data;
  if (operand.extent.empty()) return result;
  for (int i = 0, dim = 0; dim < num_row_dims; ++i) {
    if (i != without) result.strides[dim++] = operand.stride(i);
  }
  return result;
}

int64_t last_stride(const Operand& output) {
  return output.extent.empty() ? 1 : output.stride(output.view->rank - 1);
}

Part part_of(const PartOperands& part, const PartsOperands& operands) {
  const int dims = operands.num_row_dims;
  Part result{.output = per_row(part.output, dims, operands.stack_dim),
              .element_stride = last_stride(part.output),
              .lse = per_row(part.lse, dims, operands.stack_dim),
              .empty = per_row(part.empty, dims),
              .index = {},
              .dtype = part.output.dtype(),
              .base = part.base,
              .index_is_64_bit = false};
  if (part.index.given()) {
    result.index = {.data = part.index.view->data,
                    .stride = part.index.stride(0),
                    .num_rows = part.output.size(0)};
    result.index_is_64_bit = part.index.view->dtype == MERGE_ATTN_STATES_INT64;
  }
  return result;
}

bool are_alike(const Part& a, const Part& b) {
  const auto same_strides = [](const PerRow& x, const PerRow& y) {
    return std::equal(x.strides, x.strides + kMaxRowDims, y.strides);
  };
  return a.dtype == b.dtype && a.base == b.base && a.element_stride == b.element_stride &&
         same_strides(a.output, b.output) && same_strides(a.lse, b.lse);
}

template <class F>
void for_each_per_row(PartsCall& call, F&& f) {
  f(call.out);
  f(call.out_lse);
  f(call.sink);
  for (Part& part : call.parts) {
    f(part.output);
    f(part.lse);
    f(part.empty);
  }
}

// One dimension for two that continue each other in every operand, the outer one at `dim`.
bool join_with_next(PartsCall& call, int dim) {
  const int64_t outer = call.sizes[dim], inner = call.sizes[dim + 1];
  int64_t joined;  // beside a dimension of size 0 any two may be too large
  bool continues = !__builtin_mul_overflow(outer, inner, &joined);
  if (outer != 1 && inner != 1) {
    for_each_per_row(call, [&](const PerRow& operand) {
      continues &= operand.strides[dim] == inner * operand.strides[dim + 1];
    });
  }
  if (!continues) return false;
  call.sizes[dim] = joined;
  std::copy(call.sizes + dim + 2, call.sizes + kMaxRowDims, call.sizes + dim + 1);
  call.sizes[kMaxRowDims - 1] = 1;
  for_each_per_row(call, [&](PerRow& operand) {
    int64_t* strides = operand.strides;
    if (inner != 1) strides[dim] = strides[dim + 1];
    std::copy(strides + dim + 2, strides + kMaxRowDims, strides + dim + 1);
    strides[kMaxRowDims - 1] = 0;
  });
  return true;
}

void join_dimensions(PartsCall& call, const PartsOperands& operands) {
  int last = operands.num_row_dims - 1;
  for (int dim = operands.has_index ? 1 : 0; dim < last;) {
    if (join_with_next(call, dim)) {
      --last;
    } else {
      ++dim;
    }
  }
}

PartsCall call_of(PartsOperands& operands) {
  const Operand &out = operands.out, &sink = operands.sink, &scale = operands.scale;
  const DType first = operands.parts[0].output.dtype();
  PartsCall call{.head_size = out.size(out.view->rank - 1),
                 .num_parts = operands.num_parts,
                 .is_stack = operands.is_stack(),
                 .out = per_row(out, operands.num_row_dims),
                 .out_element_stride = last_stride(out),
                 .out_lse = per_row(operands.out_lse, operands.num_row_dims),
                 .out_scale = scale.given() ? static_cast<const float*>(scale.view->data) : nullptr,
                 .out_dtype = out.dtype(),
                 .acc_dtype = first == DType::kFloat64 ? first : DType::kFloat32,
                 .base = operands.parts[0].base,
                 .out_base = operands.out_base,
                 .device_type = out.view->device_type,
                 .device_index = out.view->device_index};
  const Shape shape = shape_of_rows(operands, nullptr);
  std::fill(call.sizes, call.sizes + kMaxRowDims, 1);
  std::copy(shape.data(), shape.data() + operands.num_row_dims, call.sizes);

  call.parts.reserve(operands.parts.size());
  call.parts_are_alike = !operands.has_index;
  for (const PartOperands& part : operands.parts) {
    call.parts.push_back(part_of(part, operands));
    call.mixes_bases |= part.base != call.base;
    call.parts_are_alike &= !part.empty.given() && are_alike(call.parts.front(), call.parts.back());
  }
  if (call.is_stack) {
    const PartOperands& stack = operands.parts[0];
    call.stack_output_stride =
        stack.output.extent.empty() ? 0 : stack.output.stride(operands.stack_dim);
    call.stack_lse_stride = stack.lse.extent.empty() ? 0 : stack.lse.stride(operands.stack_dim);
  }
  check_number_of_parts(operands, call.parts_are_alike);
  if (sink.given()) {
    call.sink.data = sink.view->data;
    call.sink.strides[operands.num_row_dims - 1] = sink.extent.empty() ? 0 : sink.stride(0);
    call.sink_dtype = sink.dtype();
    call.mixes_bases |= call.base != call.out_base;
  }
  if (call.mixes_bases) call.base = Base::kE;
  if (operands.state >= 0) {
    call.out_index = call.parts[operands.state].index;
    call.out_index_is_64_bit = call.parts[operands.state].index_is_64_bit;
  }
  join_dimensions(call, operands);
  return call;
}

}  // namespace

namespace {

// What a merge and its backward call have in common.
PartsOperands parts_of(const merge_attn_states_parts_args& args, Structs& structs) {
  PartsOperands operands;
  operands.num_parts = args.num_parts;
  if (args.num_parts < 1 || args.parts == nullptr) {
    refuse("outputs", [&] {
      return "expected one part or more, got " + std::to_string(std::max(args.num_parts, 0));
    });
  }
  const int listed = args.is_stack ? 1 : args.num_parts;
  if (listed > kMaxAlikeParts) {
    refuse("outputs", [&] {
      return "expected at most " + std::to_string(kMaxAlikeParts) + " parts, got " +
             std::to_string(listed);
    });
  }
  operands.parts.reserve(listed);
  for (int k = 0; k < listed; ++k) {
    const int number = args.is_stack ? -1 : k;
    const merge_attn_states_part& part = structs.part(args.parts[k], {"parts", k});
    if (part.reserved != 0) refuse({"parts", k}, [] { return "expected 0 in reserved fields"; });
    operands.parts.push_back({.output = described({"outputs", number}, part.output, false, structs),
                              .lse = described({"lses", number}, part.lse, false, structs),
                              .empty = described({"empty", number}, part.empty, true, structs),
                              .index = described({"index", number}, part.index, true, structs),
                              .base = checked_base(part.lse_base, {"lse_base", number})});
  }
  if (args.is_stack) {
    const PartOperands& stack = operands.parts[0];
    operands.stack_dim = args.stack_dim;
    if (args.stack_dim < 0 || args.stack_dim > stack.output.view->rank - 2) {
      refuse("dim", [&] {
        return "expected a row dimension of outputs, in [0, " +
               std::to_string(stack.output.view->rank - 2) + "], got " +
               std::to_string(args.stack_dim);
      });
    }
    if (stack.empty.given() || stack.index.given()) {
      refuse(stack.empty.given() ? "empty" : "index",
             [] { return "expected none for a stack, whose parts are alike, got a tensor"; });
    }
    const int64_t count = stack.output.size(args.stack_dim);
    if (count < 1 || count > kMaxAlikeParts) {
      refuse("outputs", [&] {
        return "expected 1 to " + std::to_string(kMaxAlikeParts) + " parts along dimension " +
               std::to_string(args.stack_dim) + ", got shape " + stack.output.sizes();
      });
    }
    operands.num_parts = static_cast<int>(count);
  }
  operands.sink = described("sink", args.sink, true, structs);
  operands.out_base = checked_base(args.out_lse_base, "out_lse_base");
  return operands;
}

template <class Args>
PartsCall checked_call(PartsOperands& operands, const Args& args) {
  check(operands);
  PartsCall call = call_of(operands);
  call.invert_empty = args.invert_empty != 0;
  call.dependent_launch = args.dependent_launch != 0;
  call.stream = args.stream;
  return call;
}

}  // namespace

PartsCall validate(const merge_attn_states_parts_args* given) {
  merge_attn_states_parts_args storage;
  const auto& args = of_this_version(given, "args", sizeof(storage), storage);
  Structs structs;
  PartsOperands operands = parts_of(args, structs);
  operands.out = described("out", args.out, false, structs);
  operands.out_lse = described("out_lse", args.out_lse, true, structs);
  operands.scale = described("out_scale", args.out_scale, true, structs);
  return checked_call(operands, args);
}

PartsCall validate(const merge_attn_states_backward_args* given) {
  merge_attn_states_backward_args storage;
  merge_attn_states_parts_args forward_storage;
  const auto& args = of_this_version(given, "args", sizeof(storage), storage);
  const auto& forward =
      of_this_version(args.forward, "forward", sizeof(forward_storage), forward_storage);
  Structs structs;
  PartsOperands operands = parts_of(forward, structs);
  operands.is_backward = true;
  operands.out = described("grad_out", args.grad_out, false, structs);
  operands.out_lse = described("grad_out_lse", args.grad_out_lse, true, structs);
  operands.grad_outputs = described("grad_outputs", args.grad_outputs, true, structs);
  operands.grad_lses = described("grad_lses", args.grad_lses, true, structs);
  operands.grad_sink = described("grad_sink", args.grad_sink, true, structs);
  PartsCall call = checked_call(operands, forward);
  const auto data = [](const Operand& gradient) {
    return gradient.given() ? gradient.view->data : nullptr;
  };
  call.gradients = {.outputs = data(operands.grad_outputs),
                    .lses = data(operands.grad_lses),
                    .sink = data(operands.grad_sink),
                    .outputs_dtype = operands.grad_outputs.given() ? operands.grad_outputs.dtype()
                                                                   : call.acc_dtype};
  return call;
}

PartsCall validate(const merge_attn_states_update_args* given) {
  merge_attn_states_update_args storage;
  const auto& args = of_this_version(given, "args", sizeof(storage), storage);
  if (args.reserved != 0) refuse("args", [] { return "expected 0 in reserved fields"; });
  Structs structs;
  PartsOperands operands;
  operands.num_parts = 2;
  operands.state = 0;
  operands.out_base = checked_base(args.lse_base, "lse_base");
  operands.parts = {{.output = described("out", args.out, false, structs),
                     .lse = described("lse", args.lse, false, structs),
                     .index = described("index", args.index, true, structs),
                     .base = operands.out_base},
                    {.output = described("block_out", args.block_out, false, structs),
                     .lse = described("block_lse", args.block_lse, false, structs),
                     .empty = described("empty", args.empty, true, structs),
                     .base = operands.out_base}};
  operands.out = operands.parts[0].output;
  operands.out_lse = operands.parts[0].lse;
  return checked_call(operands, args);
}

std::optional<MergeCall> as_pair(const PartsCall& call) {
  const Part &prefix = call.part(0), &suffix = call.part(call.num_parts - 1);
  const auto is_plain = [](const Part& part) {
    return part.index.data == nullptr && part.empty.data == nullptr;
  };
  const LseRule rule = call.lse_rule();
  if (!rule.is_pair || rule.out_base != Base::kE || prefix.dtype != suffix.dtype ||
      !is_plain(prefix) || !is_plain(suffix) || call.sizes[2] != 1 || call.sizes[3] != 1 ||
      (prefix.dtype != call.out_dtype && !can_convert(prefix.dtype, call.out_dtype))) {
    return std::nullopt;
  }
  const auto rows = [](const PerRow& output, int64_t element_stride) -> Rows {
    return {.data = output.data,
            .token_stride = output.strides[0],
            .head_stride = output.strides[1],
            .element_stride = element_stride};
  };
  const auto lses = [](const PerRow& lse) -> Lses {
    return {.data = lse.data, .token_stride = lse.strides[0], .head_stride = lse.strides[1]};
  };
  const auto state = [&](const Part& part) -> State {
    return {rows(part.output, part.element_stride), lses(part.lse)};
  };
  MergeCall pair{.geometry = {call.sizes[0], call.sizes[1], call.head_size},
                 .parts = {state(prefix), state(suffix)},
                 .merged = {rows(call.out, call.out_element_stride), lses(call.out_lse)},
                 .rule = {.num_tokens_with_context = call.sizes[0], .output_scale = call.out_scale},
                 .input_dtype = prefix.dtype,
                 .output_dtype = call.out_dtype,
                 .output_is_suffix = false,
                 .output_lse_is_suffix = false,
                 .device_type = call.device_type,
                 .device_index = call.device_index,
                 .dependent_launch = call.dependent_launch,
                 .stream = call.stream};
  pair.parts.suffix.output.data = call.output_data(1);
  pair.parts.suffix.lse.data = call.lse_data(1);
  return pair;
}

}  // namespace merge_attn_states
