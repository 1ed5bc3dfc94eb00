// A call's operands and structs, which point to one another.
#include "parts_call.h"

namespace merge_attn_states::fuzz {

View::View(const Regions& regions, const Operand& operand, int rank, int without, int64_t at)
    : region(&regions[operand.region]), view(operand.view) {
  for (int i = 0; i < rank; ++i) {
    if (i == without) continue;
    sizes.push_back(operand.view.sizes[i]);
    strides.push_back(operand.view.strides[i]);
  }
  if (without >= 0 && at > 0) {
    view.data = static_cast<uint8_t*>(view.data) +
                at * operand.view.strides[without] * bytes_of(view.dtype);
  }
  view.sizes = sizes.data(), view.strides = strides.data();
  view.rank = static_cast<int32_t>(sizes.size());
}

std::vector<Operand*> CallOfParts::operands() {
  std::vector<Operand*> all;
  for (FuzzedPart& part : parts) {
    const bool is_block = is_update() && &part != &parts[0];
    all.insert(all.end(), {&part.output, &part.lse});
    if (!is_update() || is_block) all.push_back(&part.empty);
    if (!is_block) all.push_back(&part.index);
  }
  if (!is_update()) all.insert(all.end(), {&sink, &out, &out_lse});
  if (entry == Entry::kMerge) all.push_back(&scale);
  if (is_backward()) all.insert(all.end(), {&grad_outputs, &grad_lses, &grad_sink});
  return all;
}

std::vector<const Operand*> CallOfParts::operands() const {
  const auto all = const_cast<CallOfParts*>(this)->operands();
  return {all.begin(), all.end()};
}

std::vector<int64_t> CallOfParts::shape() const {
  std::vector<int64_t> sizes =
      View(regions, reference(), row_dims() + 1 + is_stack, stack_dim()).sizes;
  if (parts[0].index.given && !is_update()) sizes[0] = parts[0].index.view.sizes[0];
  return sizes;
}

int64_t row_at(const CallOfParts& call, const FuzzedPart& part, int64_t place) {
  if (!part.index.given) return place;
  const auto& view = part.index.view;
  const uint8_t* at = before(call.regions[part.index.region], view, {place});
  int64_t row = 0;
  int32_t narrow = 0;
  std::memcpy(&row, at, bytes_of(view.dtype));  // little-endian
  std::memcpy(&narrow, at, sizeof(narrow));
  return view.dtype == MERGE_ATTN_STATES_INT64 ? row : narrow;
}

std::vector<const Operand*> CallOfParts::written() const {
  if (is_backward()) return {&grad_outputs, &grad_lses, &grad_sink};
  return {&written_out(), &written_lse()};
}

void CallOfParts::pass_structs() {
  for (FuzzedPart& part : parts) {
    for (Operand* operand : {&part.output, &part.lse, &part.empty, &part.index}) {
      pass(regions, *operand);
    }
    part.part.output = part.output.get();
    part.part.lse = part.lse.get();
    part.part.empty = part.empty.get();
    part.part.index = part.index.get();
    pass(part.part, part.passed);
  }
  for (Operand* operand : {&out, &out_lse, &sink, &scale, &grad_outputs, &grad_lses, &grad_sink}) {
    pass(regions, *operand);
  }
  for (size_t k = 0; k < listed.size(); ++k) {
    const FuzzedPart& each = part(static_cast<int>(k));
    listed[k] = each.is_null ? nullptr : each.passed.get();
  }
  const auto* unread = reinterpret_cast<const merge_attn_states_tensor*>(8);
  args.out = is_backward() ? unread : out.get();
  args.out_lse = is_backward() ? unread : out_lse.get();
  args.out_scale = is_backward() ? unread : scale.get();
  args.sink = sink.get();
  pass(args, passed_args);

  backward.forward = passed_args.get();
  backward.grad_out = out.get();
  backward.grad_out_lse = out_lse.get();
  backward.grad_outputs = grad_outputs.get();
  backward.grad_lses = grad_lses.get();
  backward.grad_sink = grad_sink.get();
  pass(backward, passed_backward);

  const FuzzedPart &state = parts.front(), &block = parts.back();
  update.out = state.output.get();
  update.lse = state.lse.get();
  update.index = state.index.get();
  update.block_out = block.output.get();
  update.block_lse = block.lse.get();
  update.empty = block.empty.get();
  pass(update, passed_update);
}

}  // namespace merge_attn_states::fuzz
