#include "parts_layout.h"

#include "faults.h"

namespace merge_attn_states::fuzz {
namespace {

void fill_index(const Regions& regions, const Operand& index, int64_t num_rows, uint8_t oddity,
                Random& random) {
  const bool wide = index.view.dtype == MERGE_ATTN_STATES_INT64;
  if ((!wide && index.view.dtype != MERGE_ATTN_STATES_INT32) || !can_be_filled(regions, index)) {
    return;
  }
  const uint32_t limit = static_cast<uint32_t>(std::clamp<int64_t>(num_rows, 1, 1 << 16));
  const uint32_t first = random.below(limit), most = random.below(8);
  for_each_element(index.view, [&](const Index& at, uint8_t* address) {
    int64_t row = most < 6 ? (first + at[0]) % limit : random.below(limit);
    if (num_rows == 0 || random.below(5) == 0) row = -1;
    if (random.below(2048) < oddity / 16u) row = int64_t(random.next()) >> random.below(64);
    std::memcpy(address, &row, wide ? 8 : 4);  // little-endian
  });
}

void make_call_odd(CallOfParts& call, uint8_t which, uint8_t index, int64_t number) {
  FuzzedPart& part = call.parts[index % call.parts.size()];
  const int32_t value = number & 1 ? static_cast<int32_t>(number >> 1) : index % 8 - 1;
  switch (which % 9) {
    case 0:  // any other number would be a lie
      if (value < 1 || value > 1024) call.args.num_parts = value;
      break;
    case 1:
      call.args.stack_dim = value;
      break;
    case 2:
      call.args.out_lse_base = call.update.lse_base = value;
      break;
    case 3:
      part.part.lse_base = value;
      break;
    case 4:
      part.part.reserved = value;
      break;
    case 5:
      call.update.reserved = value;
      break;
    case 6:
      part.is_null = true;
      break;
    case 7:
      call.args.parts = nullptr;
      break;
    default:
      call.is_null = true;
      break;
  }
}

}  // namespace

std::vector<std::pair<Operand*, uint8_t>> lay_out(CallOfParts& call, Bytes& bytes) {
  std::vector<std::pair<Operand*, uint8_t>> declared;
  std::vector<Operand*> placed;
  const auto lay = [&](Operand& operand, Operand FuzzedPart::*of_kind) {
    read_strides(operand, bytes);
    const bool is_gradient =
        operand.name.rfind("grad_", 0) == 0 && &operand != &call.out && &operand != &call.out_lse;
    Bytes none(nullptr, 0);
    if (is_gradient) read_strides(operand, none);
    point_view(operand);
    const size_t behind = bytes.at() + 4;
    operand.view.data = call.regions[0].bytes.get();
    if (!operand.given) {  // unless a fault gives it
      declared.emplace_back(&operand, 0);
      return bytes.seek(behind);
    }
    place(call.regions, operand, bytes, [&](uint8_t byte) -> Operand* {
      if (placed.empty()) return nullptr;
      Operand& of_part = call.parts[byte % call.parts.size()].*of_kind;
      const bool is_there = std::find(placed.begin(), placed.end(), &of_part) != placed.end();
      return byte < 0xe0 && is_there ? &of_part : placed[byte % placed.size()];
    });
    placed.push_back(&operand);
    declared.emplace_back(&operand, bytes.next());
  };
  for (size_t k = 0; k < call.parts.size(); ++k) {
    bytes.seek(bytes_of_part(k) + 3);
    FuzzedPart& part = call.parts[k];
    for (auto of_kind :
         {&FuzzedPart::output, &FuzzedPart::lse, &FuzzedPart::empty, &FuzzedPart::index}) {
      lay(part.*of_kind, of_kind);
    }
  }
  bytes.seek(kHeaderBytes + kPartBlocks * kPartBytes);
  for (Operand* operand : {&call.out, &call.grad_outputs, &call.scale}) {
    lay(*operand, &FuzzedPart::output);
  }
  for (Operand* operand : {&call.out_lse, &call.grad_lses, &call.sink, &call.grad_sink}) {
    lay(*operand, &FuzzedPart::lse);
  }
  return declared;
}

void lay_on_stack(CallOfParts& call, Operand& result, const Operand& stack, int64_t part) {
  const int dim = call.args.stack_dim;
  for (size_t i = 0, to = 0; i < stack.sizes.size() && to < result.sizes.size(); ++i) {
    if (static_cast<int>(i) != dim) result.strides[to++] = stack.strides[i];
  }
  const int64_t bytes = bytes_of(stack.view.dtype);
  result.region = stack.region;
  result.view.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(stack.view.data) +
                                             part * stack.strides[dim] * bytes);
}

void apply_fault(CallOfParts& call, Bytes& bytes) {
  const uint8_t kind = bytes.next() % kFaults, which = bytes.next(), index = bytes.next();
  const int64_t number = bytes.odd_number();
  const std::vector<Operand*> all = call.operands();
  if (kind == kCallFault) return make_call_odd(call, which, index, number);
  if (kind != kStructFault) return make_odd(*all[which % all.size()], kind, index, number);
  const auto difference = static_cast<int8_t>(index);
  const size_t target = which % (all.size() + 4);
  if (target < all.size()) return all[target]->passed.resize(difference, number);
  if (target == all.size()) return call.passed_args.resize(difference, number);
  if (target == all.size() + 1) return call.passed_update.resize(difference, number);
  if (target == all.size() + 2) return call.passed_backward.resize(difference, number);
  call.parts[index % call.parts.size()].passed.resize(difference, number);
}

void fill(CallOfParts& call, uint8_t oddity, Random& random) {
  const Regions& regions = call.regions;
  fill(regions, random);
  for (const Operand* operand : call.operands()) {
    const bool is_lse = operand->name[0] == 'l' || operand == &call.parts.back().lse;
    const uint8_t rate = operand->name[0] == 'g' ? oddity / 8 : oddity;
    fill(regions, *operand, is_lse || operand == &call.sink, rate, random);
  }
  for (const FuzzedPart& part : call.parts) {
    if (can_be_filled(regions, part.empty) && bytes_of(part.empty.view.dtype) == 1) {
      for_each_element(part.empty.view, [&](const Index&, uint8_t* at) {
        if (random.below(256) >= oddity) *at = random.below(4) == 0 ? 1 : 0;
      });
    }
    const int64_t num_rows = part.output.sizes.empty() ? 0 : part.output.sizes[0];
    fill_index(regions, part.index, num_rows, oddity, random);
  }
}

}  // namespace merge_attn_states::fuzz
