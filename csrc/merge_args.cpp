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
      refuse(prefix.name,
             "expected float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2, got " +
                 dtype_name(prefix.view->dtype));
  }
  check_dtype(suffix, prefix.dtype(), kSameAsPrefix);

  const bool quantizes = is_fp8(output.dtype()) && output.dtype() != prefix.dtype();
  if (quantizes && (is_fp8(prefix.dtype()) || prefix.dtype() == DType::kFloat64)) {
    check_dtype(output, prefix.dtype(), kSameAsPrefix);
  }
  if (!quantizes && output.dtype() != prefix.dtype()) {
    const std::string same = dtype_name(prefix.view->dtype) + ", " + kSameAsPrefix;
    const bool may_quantize = !is_fp8(prefix.dtype()) && prefix.dtype() != DType::kFloat64;
    refuse(output.name, "expected " + same +
                            (may_quantize ? " (or, with output_scale, an FP8 dtype)" : "") +
                            ", got " + dtype_name(output.view->dtype));
  }
  if (quantizes && !scale.given()) {
    refuse(scale.name, "expected one float32 for a " + dtype_name(output.view->dtype) +
                           " output of " + dtype_name(prefix.view->dtype) + " inputs, got none");
  }
  if (scale.given() && !is_fp8(output.dtype())) {
    refuse(scale.name, "expected none for a " + dtype_name(output.view->dtype) +
                           " output, since only an FP8 output is scaled, got a tensor");
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

  std::array<Operand*, 7> all() {
    return {&output,     &prefix_output, &prefix_lse,  &suffix_output,
            &suffix_lse, &output_lse,    &output_scale};
  }
};

void check_presence(Operands& operands) {
  for (Operand* operand : operands.all()) {
    const bool optional = operand == &operands.output_lse || operand == &operands.output_scale;
    if (!operand->given() && !optional) refuse(operand->name, "expected a tensor, got none");
    if (operand->given()) check_described(*operand);
  }
}

// The output says what N, H, D and the device are.
void check_output(const Operand& output) {
  check_rank(output, 3, kOutputAxes);
  if (output.size(0) < 0 || output.size(1) < 0 || output.size(2) < 0) {
    refuse(output.name, "expected sizes of 0 or more, got " + list(output.view->sizes, 3));
  }
  const TensorView& view = *output.view;
  if (view.device_type != MERGE_ATTN_STATES_CPU && view.device_type != MERGE_ATTN_STATES_CUDA) {
    refuse(output.name, "expected a CPU or CUDA device, got " +
                            device_name(view.device_type, view.device_index));
  }
}

void check_inputs(const Operands& operands) {
  const Operand& output = operands.output;
  for (const Operand* operand : {&operands.prefix_output, &operands.suffix_output}) {
    check_device(*operand, *output.view);
    check_shape<3>(*operand, {output.size(0), output.size(1), output.size(2)}, kOutputAxes);
  }
  check_dtypes(operands.prefix_output, operands.suffix_output, output, operands.output_scale);
}

void check_lses(const Operands& operands) {
  const Operand& output = operands.output;
  const bool wide = operands.prefix_output.dtype() == DType::kFloat64;
  for (const Operand* operand :
       {&operands.prefix_lse, &operands.suffix_lse, &operands.output_lse}) {
    if (!operand->given()) continue;
    check_device(*operand, *output.view);
    check_shape<2>(*operand, {output.size(1), output.size(0)}, kLseAxes);
    check_dtype(*operand, wide ? DType::kFloat64 : DType::kFloat32,
                wide ? "the dtype of an LSE of float64 outputs" : "the dtype of every LSE");
  }
}

void check_scale(const Operand& scale, const Operand& output) {
  if (!scale.given()) return;
  check_device(scale, *output.view);
  check_dtype(scale, DType::kFloat32, "the dtype of a scale");
  for (int32_t i = 0; i < scale.view->rank; ++i) {
    if (scale.size(i) != 1) {
      refuse(scale.name,
             "expected one element, got shape " + list(scale.view->sizes, scale.view->rank));
    }
  }
}

int64_t checked_count(const merge_attn_states_args& args, int64_t num_tokens) {
  if (!args.has_prefill_tokens_with_context) return num_tokens;
  const int64_t count = args.prefill_tokens_with_context;
  if (count < 0 || count > num_tokens) {
    refuse("prefill_tokens_with_context", "expected a count in [0, " + std::to_string(num_tokens) +
                                              "] = [0, num_tokens], got " + std::to_string(count));
  }
  return count;
}

void check_addresses(Operands& operands) {
  for (Operand* operand : operands.all()) {
    if (operand->given()) check_memory(*operand);
  }
  const Operand& output = operands.output;
  check_written_once(output);
  check_overlap(output, operands.prefix_output, true);
  check_overlap(output, operands.suffix_output, true);
  for (const Operand* other :
       {&operands.prefix_lse, &operands.suffix_lse, &operands.output_scale}) {
    check_overlap(output, *other, false);
  }
  const Operand& output_lse = operands.output_lse;
  if (!output_lse.given()) return;
  check_written_once(output_lse);
  check_overlap(output_lse, operands.prefix_lse, true);
  check_overlap(output_lse, operands.suffix_lse, true);
  for (const Operand* other : {&operands.output, &operands.prefix_output, &operands.suffix_output,
                               &operands.output_scale}) {
    check_overlap(output_lse, *other, false);
  }
}

// Without an element there is no address to compute, whatever the strides.
int64_t stride(const Operand& operand, int dimension) {
  return operand.memory.empty() ? 0 : operand.stride(dimension);
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
    refuse("version", "expected " + std::to_string(MERGE_ATTN_STATES_VERSION) + ", got " +
                          std::to_string(args.version));
  }
  Operands operands(args);
  check_presence(operands);
  check_output(operands.output);
  check_inputs(operands);
  check_lses(operands);
  check_scale(operands.output_scale, operands.output);
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
