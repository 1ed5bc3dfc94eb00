// The only validation: what each operand must be. Every sentence names the argument, what was
// expected and what came.
#include <cstddef>
#include <string>

#include "checks.h"
#include "merge_call.h"
#include "struct_size.h"

namespace merge_attn_states {
namespace {

using Operands = std::array<Operand, kNumOperands>;

constexpr const char* kRowAxes = "[num_tokens, num_heads, head_size]";
constexpr const char* kLseAxes = "[num_heads, num_tokens]";
constexpr const char* kSameAsPrefix = "the dtype of prefix_output";

// What the structs of every caller hold. Behind it a field may be missing, and is then 0; none may
// hide in padding at the end, which a caller leaves unset.
constexpr size_t kSmallestArgs = offsetof(merge_attn_states_args, prefill_tokens_with_context);
static_assert(sizeof(merge_attn_states_args) ==
              offsetof(merge_attn_states_args, dependent_launch) + sizeof(int32_t));

template <int kIndex>
void check_presence(const Operand& operand) {
  if (operand.given()) return check_described(operand);
  if constexpr (!kOperands[kIndex].optional) {
    refuse(operand.name, [] { return "expected a tensor, got none"; });
  }
}

// The output says what N, H, D and the device are.
void check_output(const Operand& output) {
  check_rank(output, 3, kRowAxes);
  if ((output.size(0) | output.size(1) | output.size(2)) < 0) {
    refuse(output.name, [&] { return "expected sizes of 0 or more, got " + output.sizes(); });
  }
  check_device_kind(output);
}

template <Axes axes>
void check_place_and_shape(const Operand& operand, const Operand& output) {
  check_device(operand, *output.view, output.name);
  switch (axes) {
    case Axes::kRows:
      return check_shape<0, 1, 2>(operand, output, kRowAxes);
    case Axes::kLses:
      return check_shape<1, 0>(operand, output, kLseAxes);
    case Axes::kOne:
      return check_one_element(operand);
  }
}

// Row by row the dtype table of the operation: what the output may be, and who has a scale.
void check_dtypes(const Operands& operands) {
  const Operand &prefix = operands[kPrefixOutput], &output = operands[kOutput],
                &scale = operands[kOutputScale];
  check_supported(prefix);
  check_dtype(operands[kSuffixOutput], prefix.dtype(), kSameAsPrefix);

  const bool converts = output.dtype() != prefix.dtype();
  if (converts && !can_convert(prefix.dtype(), output.dtype())) {
    refuse(output.name, [&] {
      const char* others = is_fp8(prefix.dtype()) ? " (or float32, float16 or bfloat16)"
                           : prefix.dtype() != DType::kFloat64
                               ? " (or, with output_scale, an FP8 dtype)"
                               : "";
      return "expected " + dtype_name(prefix.view->dtype) + ", " + kSameAsPrefix + others +
             ", got " + dtype_name(output.view->dtype);
    });
  }
  if (converts && is_fp8(output.dtype()) && !scale.given()) {
    refuse(scale.name, [&] {
      return "expected one float32 for a " + dtype_name(output.view->dtype) + " output of " +
             dtype_name(prefix.view->dtype) + " inputs, got none";
    });
  }
  if (scale.given() && !is_fp8(output.dtype())) {
    refuse(scale.name, [&] {
      return "expected none for a " + dtype_name(output.view->dtype) +
             " output, since only an FP8 output is scaled, got a tensor";
    });
  }

  const bool wide = prefix.dtype() == DType::kFloat64;
  for_each_operand([&](auto i) {
    if (kOperands[i].axes != Axes::kLses || !operands[i].given()) return;
    check_dtype(operands[i], wide ? DType::kFloat64 : DType::kFloat32,
                wide ? "the dtype of an LSE of float64 outputs" : "the dtype of every LSE");
  });
  if (scale.given()) check_dtype(scale, DType::kFloat32, "the dtype of a scale");
}

int64_t checked_count(const merge_attn_states_args& args, int64_t num_tokens) {
  if (!args.has_prefill_tokens_with_context) return num_tokens;
  const int64_t count = args.prefill_tokens_with_context;
  if (count < 0 || count > num_tokens) {
    refuse(kCountName, [&] {
      return "expected a count in [0, " + std::to_string(num_tokens) + "] = [0, num_tokens], got " +
             std::to_string(count);
    });
  }
  return count;
}

void check_memory_and_overlap(Operands& operands) {
  for_each_operand([&](auto i) {
    if (operands[i].given()) check_memory<kOperands[i].axes>(operands[i]);
  });
  for_each_operand([&](auto written) {
    constexpr const OperandSpec& spec = kOperands[written];
    if (!spec.written || !operands[written].given()) return;
    check_written_once(operands[written], address_rank(spec.axes));
    for_each_operand([&](auto other) {
      // Two that are written stand beside each other once.
      if (other == written || (kOperands[other].written && other > written)) return;
      check_overlap(operands[written], operands[other], may_be_same(spec, kOperands[other]));
    });
  });
}

// Without an element there is no address to compute, whatever the strides.
Rows rows(const Operand& output) {
  if (output.extent.empty()) return {.data = output.view->data};
  return {.data = output.view->data,
          .token_stride = output.stride(0),
          .head_stride = output.stride(1),
          .element_stride = output.stride(2)};
}

Lses lses(const Operand& lse) {
  if (lse.extent.empty()) return {.data = lse.given() ? lse.view->data : nullptr};
  return {.data = lse.view->data, .token_stride = lse.stride(1), .head_stride = lse.stride(0)};
}

}  // namespace

MergeCall validate(const merge_attn_states_args* given) {
  merge_attn_states_args args_storage;
  const merge_attn_states_args& args = of_this_version(given, "args", kSmallestArgs, args_storage);
  Operands operands;
  std::array<TensorView, kNumOperands> views;
  for_each_operand([&](auto i) {
    const TensorView* view = args.*kOperands[i].field;
    if (view != nullptr) {
      view = &of_this_version(view, kOperands[i].name, kSmallestTensor, views[i]);
    }
    operands[i] = {kOperands[i].name, address_rank(kOperands[i].axes), view};
  });

  for_each_operand([&](auto i) { check_presence<i>(operands[i]); });
  const Operand& output = operands[kOutput];
  check_output(output);
  for_each_operand([&](auto i) {
    if (operands[i].given()) check_place_and_shape<kOperands[i].axes>(operands[i], output);
  });
  check_dtypes(operands);
  const int64_t count = checked_count(args, output.size(0));
  check_memory_and_overlap(operands);

  const TensorView* scale = operands[kOutputScale].view;
  const Operand& output_lse = operands[kOutputLse];
  return {.geometry = {.num_tokens = output.size(0),
                       .num_heads = output.size(1),
                       .head_size = output.size(2)},
          .parts = {.prefix = {rows(operands[kPrefixOutput]), lses(operands[kPrefixLse])},
                    .suffix = {rows(operands[kSuffixOutput]), lses(operands[kSuffixLse])}},
          .merged = {rows(output), lses(output_lse)},
          .rule = {.num_tokens_with_context = count,
                   .output_scale = scale ? static_cast<const float*>(scale->data) : nullptr},
          .input_dtype = operands[kPrefixOutput].dtype(),
          .output_dtype = output.dtype(),
          .output_is_suffix = is_same(output, operands[kSuffixOutput]),
          .output_lse_is_suffix = output_lse.given() && is_same(output_lse, operands[kSuffixLse]),
          .device_type = output.view->device_type,
          .device_index = output.view->device_index,
          .dependent_launch = args.dependent_launch != 0,
          .stream = args.stream};
}

}  // namespace merge_attn_states
