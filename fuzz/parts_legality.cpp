#include "parts_legality.h"

#include "faults.h"

namespace merge_attn_states::fuzz {
namespace {

constexpr int kMostAlikeParts = 1024, kMostRowDims = 4;

bool is_base(int32_t base) { return base == 0 || base == 1; }

bool is_float(uint32_t dtype) { return dtype == kF32 || dtype == kF16 || dtype == kBF16; }

std::vector<const Operand*> given(const CallOfParts& call) {
  std::vector<const Operand*> result;
  for (const Operand* operand : call.operands()) {
    if (operand->given) result.push_back(operand);
  }
  return result;
}

bool is_result(const CallOfParts& call, const Operand* operand) {
  for (const Operand* written : call.written()) {
    if (written == operand) return true;
  }
  return false;
}

// ---- structs, and what is needed to read them

Names unreadable(const CallOfParts& call) {
  const bool known =
      call.is_update()     ? is_of_a_known_version(call.passed_update, sizeof(call.update))
      : call.is_backward() ? is_of_a_known_version(call.passed_backward, sizeof(call.backward))
                           : is_of_a_known_version(call.passed_args, sizeof(call.args));
  if (call.is_null || !known) return {"args"};
  if (call.is_update()) return call.update.reserved != 0 ? Names{"args"} : Names{};
  if (!is_of_a_known_version(call.passed_args, sizeof(call.args))) return {"forward"};
  const bool too_many = !call.is_stack && call.args.num_parts > kMostAlikeParts;
  if (call.args.parts == nullptr || call.args.num_parts < 1 || too_many) return {"outputs"};
  return {};
}

Names undescribed(const CallOfParts& call) {
  Names names;
  for (int k = 0; !call.is_update() && k < std::min<int>(call.args.num_parts, call.parts.size());
       ++k) {
    const FuzzedPart& part = call.parts[k];
    const bool is_readable = is_of_a_known_version(part.passed, sizeof(part.part));
    const std::string number = "[" + std::to_string(k) + "]";
    if (part.is_null || !is_readable || part.part.reserved) names.insert("parts" + number);
    if (!is_base(part.part.lse_base)) names.insert("lse_base" + (call.is_stack ? "" : number));
  }
  if (!is_base(call.out_base())) names.insert(call.is_update() ? "lse_base" : "out_lse_base");
  for (const Operand* operand : given(call)) {
    const auto& view = operand->view;
    const auto is_negative = [](int64_t size) { return size < 0; };
    if (!is_of_a_known_version(*operand) || !is_described(view) ||
        std::any_of(view.sizes, view.sizes + view.rank, is_negative)) {
      names.insert(operand->name);
    }
  }
  for (const FuzzedPart& part : call.parts) {
    for (const Operand* operand : {&part.output, &part.lse}) {
      if (!operand->given) names.insert(operand->name);
    }
  }
  if (!call.is_update() && !call.out.given) names.insert(call.out.name);
  const FuzzedPart& stack = call.parts[0];
  if (!call.is_stack || names.count(stack.output.name)) return names;
  const int rank = stack.output.view.rank, dim = call.args.stack_dim;
  if (dim < 0 || dim > rank - 2) names.insert("dim");
  if (stack.empty.given) names.insert("empty");
  if (stack.index.given) names.insert("index");
  const int64_t count = names.count("dim") ? 1 : stack.output.view.sizes[dim];
  if (count < 1 || count > kMostAlikeParts) names.insert("outputs");
  return names;
}

// ---- shapes, dtypes, devices

// Of an LSE or a mask: that of its output without the last dimension, or with 1 in its place.
bool has_rows_of(const Operand& operand, const Operand& output) {
  std::vector<int64_t> sizes(output.view.sizes, output.view.sizes + output.view.rank);
  sizes.back() = 1;
  if (has_shape(operand.view, sizes)) return true;
  sizes.pop_back();
  return has_shape(operand.view, sizes);
}

bool fits_result(const CallOfParts& call, uint32_t first) {
  const uint32_t out = call.out.view.dtype;
  if (call.is_backward()) return first == kF64 ? out == kF64 : is_float(out);
  return out == first || (first != kF64 && is_float(out)) || (is_float(first) && is_fp8(out));
}

Names misfits(const CallOfParts& call) {
  Names names;
  const Operand& reference = call.reference();
  if (call.row_dims() < 1 || call.row_dims() > kMostRowDims) return {reference.name};
  for (const FuzzedPart& part : call.parts) {
    if (part.index.given && (call.row_dims() != 2 || part.index.view.rank != 1)) {
      names.insert(part.index.name);
    }
  }
  if (!names.empty()) return names;
  const std::vector<int64_t> shape = call.shape();
  const uint32_t first = call.parts[0].output.view.dtype, of_lse = first == kF64 ? kF64 : kF32;
  const auto expect = [&](const Operand& operand, bool fits) {
    if (operand.given && !fits) names.insert(operand.name);
  };
  for (const FuzzedPart& part : call.parts) {
    const auto& view = part.output.view;
    std::vector<int64_t> rows = shape;
    if (part.index.given && view.rank > 0) rows[0] = view.sizes[0];
    const bool may_differ = is_float(view.dtype) && is_float(first);
    const bool has_gradient = !call.is_backward() || !is_fp8(view.dtype);
    expect(part.output, (call.is_stack || has_shape(view, rows)) && is_known(view.dtype) &&
                            (view.dtype == first || may_differ) && has_gradient);
    if (view.rank == 0) continue;
    expect(part.lse, has_rows_of(part.lse, part.output) && part.lse.view.dtype == of_lse);
    const uint32_t of_index = part.index.view.dtype;
    expect(part.empty,
           has_rows_of(part.empty, part.output) && part.empty.view.dtype == MERGE_ATTN_STATES_BOOL);
    expect(part.index,
           has_shape(part.index.view, {shape[0]}) &&
               (of_index == MERGE_ATTN_STATES_INT32 || of_index == MERGE_ATTN_STATES_INT64));
  }
  if (!call.is_update()) {
    expect(call.out, has_shape(call.out.view, shape) && fits_result(call, first));
    if (call.out.view.rank > 0 && is_described(call.out.view)) {
      expect(call.out_lse,
             has_rows_of(call.out_lse, call.out) && call.out_lse.view.dtype == of_lse);
    }
    const uint32_t of_sink = call.sink.view.dtype;
    expect(call.sink, has_shape(call.sink.view, {shape[shape.size() - 2]}) &&
                          (first == kF64 ? of_sink == kF64 : is_float(of_sink)));
  }
  if (call.entry == Entry::kMerge) {
    const auto& view = call.scale.view;
    const bool fp8 = is_fp8(call.out.view.dtype);
    expect(call.scale, has_shape(view, std::vector<int64_t>(std::max(view.rank, 0), 1)) && fp8 &&
                           view.dtype == kF32);
    if (fp8 && is_float(first) && !call.scale.given) names.insert(call.scale.name);
  }
  if (!is_on_a_device(reference.view)) names.insert(reference.name);
  for (const Operand* operand : given(call)) {
    const bool is_gradient = call.is_backward() && is_result(call, operand);
    if (!is_gradient) expect(*operand, is_on_device_of(operand->view, reference.view));
  }
  return names;
}

}  // namespace

Names faulty_arguments(const CallOfParts& call) {
  Names names = unreadable(call);
  if (names.empty()) names = undescribed(call);
  if (names.empty()) names = misfits(call);
  if (names.empty()) names = misplaced(call);
  if (names.empty()) names = overlapping(call);
  if (names.empty()) names = out_of_range(call);
  return names;
}

}  // namespace merge_attn_states::fuzz
