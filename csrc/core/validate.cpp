// The only validation: what each operand must be. Every sentence names the argument, what was
// expected and what came.
#include "merge_args.h"

#include <string>

#include "operand.h"

namespace merge_attn_states {
namespace {

constexpr const char* kOutputAxes = "[num_tokens, num_heads, head_size]";
constexpr const char* kLseAxes = "[num_heads, num_tokens]";
constexpr const char* kSameAsPrefix = "the dtype of prefix_output";

// The dtype table of the operation.
void check_dtypes(const Operand& prefix, const Operand& suffix, const Operand& output,
                  const Operand& scale) {
  switch (prefix.dtype()) {
    case DType::kFloat32:
    case DType::kFloat16:
    case DType::kBFloat16:
    case DType::kFloat64:
    case DType::kFloat8E4M3:
    case DType::kFloat8E5M2:
      break;
    default:
      refuse(prefix.name, [&] {
        return "expected float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2, got " +
               dtype_name(prefix.view->dtype);
      });
  }
  check_dtype(suffix, prefix.dtype(), kSameAsPrefix);

  const bool may_quantize = !is_fp8(prefix.dtype()) && prefix.dtype() != DType::kFloat64;
  const bool quantizes = is_fp8(output.dtype()) && output.dtype() != prefix.dtype();
  if (quantizes && !may_quantize) check_dtype(output, prefix.dtype(), kSameAsPrefix);
  if (!quantizes && output.dtype() != prefix.dtype()) {
    refuse(output.name, [&] {
      return "expected " + dtype_name(prefix.view->dtype) + ", " + kSameAsPrefix +
             (may_quantize ? " (or, with output_scale, an FP8 dtype)" : "") + ", got " +
             dtype_name(output.view->dtype);
    });
  }
  if (quantizes && !scale.given()) {
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
}

// The operands of a call in the schema's order.
struct Operands {
  Operand output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, output_scale;

  explicit Operands(const merge_attn_states_args& args)
      : output{"output", args.output},
        prefix_output{"prefix_output", args.prefix_output},
        prefix_lse{"prefix_lse", args.prefix_lse},
        suffix_output{"suffix_output", args.suffix_output},
        suffix_lse{"suffix_lse", args.suffix_lse},
        output_lse{"output_lse", args.output_lse},
        output_scale{"output_scale", args.output_scale} {}
};

void check_needed(const Operand& operand) {
  if (!operand.given()) {
    refuse(operand.name, [] { return "expected a tensor, got none"; });
  }
  check_described(operand);
}

void check_presence(const Operands& operands) {
  check_needed(operands.output);
  check_needed(operands.prefix_output);
  check_needed(operands.prefix_lse);
  check_needed(operands.suffix_output);
  check_needed(operands.suffix_lse);
  if (operands.output_lse.given()) check_described(operands.output_lse);
  if (operands.output_scale.given()) check_described(operands.output_scale);
}

// The output says what N, H, D and the device are.
void check_output(const Operand& output) {
  check_rank(output, 3, kOutputAxes);
  if ((output.size(0) | output.size(1) | output.size(2)) < 0) {
    refuse(output.name, [&] { return "expected sizes of 0 or more, got " + output.sizes(); });
  }
  const TensorView& view = *output.view;
  if (view.device_type != MERGE_ATTN_STATES_CPU && view.device_type != MERGE_ATTN_STATES_CUDA) {
    refuse(output.name, [&] {
      return "expected a CPU or CUDA device, got " +
             device_name(view.device_type, view.device_index);
    });
  }
}

void check_input(const Operand& input, const Operand& output) {
  check_device(input, *output.view);
  check_shape<3>(input, {output.size(0), output.size(1), output.size(2)}, kOutputAxes);
}

void check_lse(const Operand& lse, const Operand& output, bool wide) {
  check_device(lse, *output.view);
  check_shape<2>(lse, {output.size(1), output.size(0)}, kLseAxes);
  check_dtype(lse, wide ? DType::kFloat64 : DType::kFloat32,
              wide ? "the dtype of an LSE of float64 outputs" : "the dtype of every LSE");
}

void check_scale(const Operand& scale, const Operand& output) {
  check_device(scale, *output.view);
  check_dtype(scale, DType::kFloat32, "the dtype of a scale");
  for (int32_t i = 0; i < scale.view->rank; ++i) {
    if (scale.size(i) != 1) {
      refuse(scale.name, [&] { return "expected one element, got shape " + scale.sizes(); });
    }
  }
}

int64_t checked_count(const merge_attn_states_args& args, int64_t num_tokens) {
  if (!args.has_prefill_tokens_with_context) return num_tokens;
  const int64_t count = args.prefill_tokens_with_context;
  if (count < 0 || count > num_tokens) {
    refuse("prefill_tokens_with_context", [&] {
      return "expected a count in [0, " + std::to_string(num_tokens) + "] = [0, num_tokens], got " +
             std::to_string(count);
    });
  }
  return count;
}

void check_addresses(Operands& operands) {
  auto& [output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, scale] =
      operands;
  check_memory<3>(output);
  check_memory<3>(prefix_output);
  check_memory<2>(prefix_lse);
  check_memory<3>(suffix_output);
  check_memory<2>(suffix_lse);
  if (output_lse.given()) check_memory<2>(output_lse);
  if (scale.given()) check_memory<0>(scale);

  check_written_once(output);
  check_overlap(output, prefix_output, true);
  check_overlap(output, suffix_output, true);
  check_overlap(output, prefix_lse, false);
  check_overlap(output, suffix_lse, false);
  check_overlap(output, scale, false);
  if (!output_lse.given()) return;
  check_written_once(output_lse);
  check_overlap(output_lse, prefix_lse, true);
  check_overlap(output_lse, suffix_lse, true);
  check_overlap(output_lse, output, false);
  check_overlap(output_lse, prefix_output, false);
  check_overlap(output_lse, suffix_output, false);
  check_overlap(output_lse, scale, false);
}

// Without an element there is no address to compute, whatever the strides.
int64_t stride(const Operand& operand, int dimension) {
  return operand.extent.empty() ? 0 : operand.stride(dimension);
}

Rows rows(const Operand& operand) {
  return {.data = operand.view->data,
          .token_stride = stride(operand, 0),
          .head_stride = stride(operand, 1),
          .element_stride = stride(operand, 2)};
}

LseRows lse_rows(const Operand& operand) {
  if (!operand.given()) return {};
  return {.data = operand.view->data,
          .head_stride = stride(operand, 0),
          .token_stride = stride(operand, 1)};
}

}  // namespace

MergeArgs validate(const merge_attn_states_args& args) {
  if (args.version != MERGE_ATTN_STATES_VERSION) {
    refuse("version", [&] {
      return "expected " + std::to_string(MERGE_ATTN_STATES_VERSION) + ", got " +
             std::to_string(args.version);
    });
  }
  Operands operands(args);
  check_presence(operands);
  check_output(operands.output);
  check_input(operands.prefix_output, operands.output);
  check_input(operands.suffix_output, operands.output);
  check_dtypes(operands.prefix_output, operands.suffix_output, operands.output,
               operands.output_scale);
  const bool wide = operands.prefix_output.dtype() == DType::kFloat64;
  check_lse(operands.prefix_lse, operands.output, wide);
  check_lse(operands.suffix_lse, operands.output, wide);
  if (operands.output_lse.given()) check_lse(operands.output_lse, operands.output, wide);
  if (operands.output_scale.given()) check_scale(operands.output_scale, operands.output);
  const int64_t count = checked_count(args, operands.output.size(0));
  check_addresses(operands);

  const Operand& output = operands.output;
  const TensorView* scale = operands.output_scale.view;
  return {.num_tokens = output.size(0),
          .num_heads = output.size(1),
          .head_size = output.size(2),
          .num_tokens_with_context = count,
          .output = rows(output),
          .prefix_output = rows(operands.prefix_output),
          .suffix_output = rows(operands.suffix_output),
          .prefix_lse = lse_rows(operands.prefix_lse),
          .suffix_lse = lse_rows(operands.suffix_lse),
          .output_lse = lse_rows(operands.output_lse),
          .output_scale = scale != nullptr ? static_cast<const float*>(scale->data) : nullptr,
          .input_dtype = operands.prefix_output.dtype(),
          .output_dtype = output.dtype(),
          .device_type = output.view->device_type,
          .device_index = output.view->device_index,
          .stream = args.stream};
}

}  // namespace merge_attn_states
