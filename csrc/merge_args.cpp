// The only validation. Every sentence names the argument, what was expected and what came.
#include "merge_args.h"

#include <array>
#include <string>

#include "footprint.h"

namespace merge_attn_states {
namespace {

constexpr const char* kOutputAxes = "[num_tokens, num_heads, head_size]";
constexpr const char* kLseAxes = "[num_heads, num_tokens]";
constexpr const char* kSameAsPrefix = "the dtype of prefix_output";

[[noreturn]] void refuse(const char* name, const std::string& sentence) {
  throw std::invalid_argument(std::string(name) + ": " + sentence);
}

// One operand under its name, with the bytes that it touches.
struct Operand {
  const char* name;
  const TensorView* view;  // null: not given
  Footprint memory{};

  int64_t size(int i) const { return view->sizes[i]; }
  int64_t stride(int i) const { return view->sizes[i] == 1 ? 0 : view->strides[i]; }
  DType dtype() const { return static_cast<DType>(view->dtype); }
  bool given() const { return view != nullptr; }
};

void check_described(const Operand& operand) {
  const TensorView& view = *operand.view;
  if (view.rank < 0 || (view.rank > 0 && (view.sizes == nullptr || view.strides == nullptr))) {
    refuse(operand.name, "expected a rank of 0 or more with its sizes and strides, got rank " +
                             std::to_string(view.rank));
  }
}

void check_rank(const Operand& operand, int rank, const char* axes) {
  if (operand.view->rank != rank) {
    refuse(operand.name, "expected " + std::to_string(rank) + " dimensions " + axes + ", got " +
                             std::to_string(operand.view->rank) + ": " +
                             list(operand.view->sizes, operand.view->rank));
  }
}

template <size_t rank>
void check_shape(const Operand& operand, const std::array<int64_t, rank>& expected,
                 const char* axes) {
  check_rank(operand, rank, axes);
  for (size_t i = 0; i < rank; ++i) {
    if (operand.size(i) != expected[i]) {
      refuse(operand.name, "expected shape " + list(expected.data(), rank) + " = " + axes +
                               ", got " + list(operand.view->sizes, rank));
    }
  }
}

void check_device(const Operand& operand, const TensorView& output) {
  const TensorView& view = *operand.view;
  if (view.device_type != output.device_type || view.device_index != output.device_index) {
    refuse(operand.name, "expected device " + device_name(output.device_type, output.device_index) +
                             ", the device of output, got " +
                             device_name(view.device_type, view.device_index));
  }
}

void check_dtype(const Operand& operand, DType expected, const char* why) {
  if (operand.dtype() != expected) {
    refuse(operand.name, "expected " + dtype_name(static_cast<uint32_t>(expected)) + ", " + why +
                             ", got " + dtype_name(operand.view->dtype));
  }
}

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

// Elements that exist, lie in the memory that is said to hold them, and are aligned to their size.
void check_memory(Operand& operand) {
  const TensorView& view = *operand.view;
  const int64_t bytes = size_of(operand.dtype());
  const bool scalar = view.rank > kMaxRank;  // output_scale: any number of dimensions of size 1
  const auto memory = footprint(view.data, view.sizes, view.strides, scalar ? 0 : view.rank, bytes);
  if (!memory) {
    refuse(operand.name, "expected elements within 64-bit addresses, got sizes " +
                             list(view.sizes, view.rank) + " with strides " +
                             list(view.strides, view.rank));
  }
  operand.memory = *memory;
  if (memory->empty()) return;
  if (view.data == nullptr) refuse(operand.name, "expected memory, got a null data pointer");
  if (reinterpret_cast<uintptr_t>(view.data) % bytes != 0) {
    refuse(operand.name, "expected an address that is a multiple of " + std::to_string(bytes) +
                             " bytes, the size of " + dtype_name(view.dtype) + ", got " +
                             std::to_string(reinterpret_cast<uintptr_t>(view.data)));
  }
  if (view.memory_bytes == 0) return;
  const uint64_t begin = reinterpret_cast<uintptr_t>(view.memory);
  if (view.memory_bytes < 0 || memory->begin < begin ||
      memory->end - begin > static_cast<uint64_t>(view.memory_bytes)) {
    refuse(operand.name, "expected elements inside its memory of " +
                             std::to_string(view.memory_bytes) + " bytes, got sizes " +
                             list(view.sizes, view.rank) + " with strides " +
                             list(view.strides, view.rank) + " that reach outside");
  }
}

// Same memory, same strides: then each row's values are read and written by one thread.
bool is_same(const Operand& a, const Operand& b) {
  if (a.view->data != b.view->data || a.dtype() != b.dtype()) return false;
  for (int i = 0; i < a.view->rank; ++i) {
    if (a.size(i) != b.size(i) || a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

void check_written_once(const Operand& written) {
  if (overlaps_itself(written.memory)) {
    refuse(written.name, "expected memory of its own for each element, got sizes " +
                             list(written.view->sizes, written.view->rank) + " with strides " +
                             list(written.view->strides, written.view->rank) +
                             " that overlap themselves");
  }
}

void check_overlap(const Operand& written, const Operand& other, bool may_be_same) {
  if (!other.given() || !overlaps(written.memory, other.memory)) return;
  if (may_be_same && is_same(written, other)) return;
  refuse(written.name,
         std::string("expected no memory in common with ") + other.name +
             (may_be_same ? " or exactly its memory with its strides, got a partial overlap"
                          : ", got an overlap"));
}

Rows rows(const Operand& operand) {
  return {.data = operand.view->data,
          .token_stride = operand.stride(0),
          .head_stride = operand.stride(1),
          .element_stride = operand.stride(2)};
}

LseRows lse_rows(const Operand& operand) {
  if (!operand.given()) return {};
  return {.data = operand.view->data,
          .head_stride = operand.stride(0),
          .token_stride = operand.stride(1)};
}

}  // namespace

MergeArgs validate(const merge_attn_states_args& args) {
  if (args.version != MERGE_ATTN_STATES_VERSION) {
    refuse("version", "expected " + std::to_string(MERGE_ATTN_STATES_VERSION) + ", got " +
                          std::to_string(args.version));
  }
  Operand output{"output", args.output};
  Operand prefix_output{"prefix_output", args.prefix_output};
  Operand prefix_lse{"prefix_lse", args.prefix_lse};
  Operand suffix_output{"suffix_output", args.suffix_output};
  Operand suffix_lse{"suffix_lse", args.suffix_lse};
  Operand output_lse{"output_lse", args.output_lse};
  Operand output_scale{"output_scale", args.output_scale};
  for (const Operand* operand :
       {&output, &prefix_output, &prefix_lse, &suffix_output, &suffix_lse}) {
    if (!operand->given()) refuse(operand->name, "expected a tensor, got none");
  }
  Operand* const operands[] = {&output,     &prefix_output, &prefix_lse,  &suffix_output,
                               &suffix_lse, &output_lse,    &output_scale};
  for (const Operand* operand : operands) {
    if (operand->given()) check_described(*operand);
  }

  check_rank(output, 3, kOutputAxes);
  const int64_t num_tokens = output.size(0), num_heads = output.size(1), head_size = output.size(2);
  if (num_tokens < 0 || num_heads < 0 || head_size < 0) {
    refuse(output.name, "expected sizes of 0 or more, got " + list(output.view->sizes, 3));
  }
  if (args.output->device_type != MERGE_ATTN_STATES_CPU &&
      args.output->device_type != MERGE_ATTN_STATES_CUDA) {
    refuse(output.name, "expected a CPU or CUDA device, got " +
                            device_name(args.output->device_type, args.output->device_index));
  }

  for (const Operand* operand : {&prefix_output, &suffix_output}) {
    check_device(*operand, *args.output);
    check_shape<3>(*operand, {num_tokens, num_heads, head_size}, kOutputAxes);
  }
  check_dtypes(prefix_output, suffix_output, output, output_scale);
  const bool wide = prefix_output.dtype() == DType::kFloat64;
  for (const Operand* operand : {&prefix_lse, &suffix_lse, &output_lse}) {
    if (!operand->given()) continue;
    check_device(*operand, *args.output);
    check_shape<2>(*operand, {num_heads, num_tokens}, kLseAxes);
    check_dtype(*operand, wide ? DType::kFloat64 : DType::kFloat32,
                wide ? "the dtype of an LSE of float64 outputs" : "the dtype of every LSE");
  }
  if (output_scale.given()) {
    check_device(output_scale, *args.output);
    check_dtype(output_scale, DType::kFloat32, "the dtype of a scale");
    for (int32_t i = 0; i < output_scale.view->rank; ++i) {
      if (output_scale.size(i) != 1) {
        refuse(output_scale.name, "expected one element, got shape " +
                                      list(output_scale.view->sizes, output_scale.view->rank));
      }
    }
  }

  int64_t count = num_tokens;
  if (args.has_prefill_tokens_with_context) {
    count = args.prefill_tokens_with_context;
    if (count < 0 || count > num_tokens) {
      refuse("prefill_tokens_with_context",
             "expected a count in [0, " + std::to_string(num_tokens) + "] = [0, num_tokens], got " +
                 std::to_string(count));
    }
  }

  for (Operand* operand : operands) {
    if (operand->given()) check_memory(*operand);
  }
  check_written_once(output);
  check_overlap(output, prefix_output, true);
  check_overlap(output, suffix_output, true);
  for (const Operand* lse : {&prefix_lse, &suffix_lse, &output_scale}) {
    check_overlap(output, *lse, false);
  }
  if (output_lse.given()) {
    check_written_once(output_lse);
    check_overlap(output_lse, prefix_lse, true);
    check_overlap(output_lse, suffix_lse, true);
    for (const Operand* other : {&output, &prefix_output, &suffix_output, &output_scale}) {
      check_overlap(output_lse, *other, false);
    }
  }

  return {.num_tokens = num_tokens,
          .num_heads = num_heads,
          .head_size = head_size,
          .num_tokens_with_context = count,
          .output = rows(output),
          .prefix_output = rows(prefix_output),
          .suffix_output = rows(suffix_output),
          .prefix_lse = lse_rows(prefix_lse),
          .suffix_lse = lse_rows(suffix_lse),
          .output_lse = lse_rows(output_lse),
          .output_scale =
              output_scale.given() ? static_cast<const float*>(args.output_scale->data) : nullptr,
          .input_dtype = prefix_output.dtype(),
          .output_dtype = output.dtype(),
          .device_type = args.output->device_type,
          .device_index = args.output->device_index,
          .stream = args.stream};
}

}  // namespace merge_attn_states
