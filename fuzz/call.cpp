// Reads a call from bytes. Every field has a fixed place, so that a mutation is a local change.
#include "call.h"

#include <algorithm>

#include "faults.h"
#include "place.h"
#include "values.h"

namespace merge_attn_states::fuzz {
namespace {

// 8 is one pack of the CPU kernel, 16 a tile of tokens, 32 one of heads; most are small, for speed.
constexpr int64_t kSizes[] = {2, 1, 3, 0, 1, 4, 2, 5, 3, 7, 8, 9, 16, 17, 24, 33};

struct DTypes {
  uint32_t input, output;
};

// The pairs that are legal; faults make the others.
constexpr DTypes kDTypes[] = {
    {kF32, kF32},  {kF16, kF16},  {kBF16, kBF16}, {kF64, kF64},  {kE4M3, kE4M3}, {kE5M2, kE5M2},
    {kF32, kE4M3}, {kF32, kE5M2}, {kF16, kE4M3},  {kF16, kE5M2}, {kBF16, kE4M3}, {kBF16, kE5M2},
    {kE4M3, kF32}, {kE5M2, kF32}, {kE4M3, kF16},  {kE5M2, kF16}, {kE4M3, kBF16}, {kE5M2, kBF16}};
void resize_struct(Call& call, uint8_t which, int8_t difference, int64_t number) {
  const int target = which % (kRoles + 2);
  if (target < kRoles) return call.operands[target].passed.resize(difference, number);
  if (target == kRoles) return call.passed.resize(difference, number);
  Passed<merge_attn_states_selection> selection;
  selection.resize(difference, number);
  call.selection_size = selection.size;
}

// One property of one operand, or of the call, is made odd.
void apply_fault(Call& call, Bytes& bytes) {
  const uint8_t kind = bytes.next() % kFaults, which = bytes.next(), index = bytes.next();
  const int64_t number = bytes.odd_number();
  if (kind == kStructFault) {
    resize_struct(call, which, static_cast<int8_t>(index), number);
  } else if (kind == kCallFault) {
    call.args.prefill_tokens_with_context = number;
  } else {
    make_odd(call.operands[which % kRoles], kind, index, number);
  }
}

// The dense call before anything is odd: its dtypes and shapes.
void describe_operands(Call& call, const DTypes& dtypes, const int64_t (&sizes)[3]) {
  for (int i = 0; i < kRoles; ++i) {
    merge_attn_states_tensor& view = call.operands[i].view;
    call.operands[i].name = kNames[i];
    view.device_type = call.on_cuda ? MERGE_ATTN_STATES_CUDA : MERGE_ATTN_STATES_CPU;
    if (i == kOutput || i == kPrefixOutput || i == kSuffixOutput) {
      view.dtype = i == kOutput ? dtypes.output : dtypes.input;
      call.operands[i].sizes = {sizes[0], sizes[1], sizes[2]};
    } else if (i == kOutputScale) {
      view.dtype = kF32;
    } else {
      view.dtype = dtypes.input == kF64 ? kF64 : kF32;
      call.operands[i].sizes = {sizes[1], sizes[0]};
    }
  }
}

// A size that every operand has: the checks let it pass, and what stands behind them meets it.
void resize_all(Call& call, Bytes& bytes) {
  const uint8_t byte = bytes.next();
  if (byte % 8 < 5) return;
  const size_t axis = byte % 8 - 5;
  const int64_t number = byte & 0x80 ? bytes.odd_number() : byte >> 3;
  for (Operand& operand : call.operands) {
    const size_t rank = operand.sizes.size();
    if (rank == 3) operand.sizes[axis] = number;
    if (rank == 2 && axis < 2) operand.sizes[1 - axis] = number;
  }
}

// The two inputs of an operand's own kind are its usual partners, any earlier operand is possible.
Operand* partner(Call& call, int role, uint8_t byte) {
  if (role == kPrefixOutput) return nullptr;
  if (byte >= 0xe0) return &call.operands[byte % role];
  const bool lse = role == kPrefixLse || role == kSuffixLse || role == kOutputLse;
  const int first = lse ? kPrefixLse : kPrefixOutput;
  if (role == first) return &call.operands[kPrefixOutput];
  return &call.operands[byte & 1 && role > first + 1 ? first + 1 : first];
}

void pass_args(Call& call) {
  for (Operand& operand : call.operands) pass(call.regions, operand);
  call.args.output = call.operands[kOutput].get();
  call.args.prefix_output = call.operands[kPrefixOutput].get();
  call.args.prefix_lse = call.operands[kPrefixLse].get();
  call.args.suffix_output = call.operands[kSuffixOutput].get();
  call.args.suffix_lse = call.operands[kSuffixLse].get();
  call.args.output_lse = call.operands[kOutputLse].get();
  call.args.output_scale = call.operands[kOutputScale].get();
  pass(call.args, call.passed);
}

}  // namespace

Call::Call(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  const DTypes dtypes = pick(kDTypes, bytes.next());
  const uint8_t flags = bytes.next();
  on_cuda = (flags & 0xf0) == 0xf0;
  // Large in one dimension at a time, for speed: no property needs two.
  const int64_t num_tokens = pick(kSizes, bytes.next());
  const int64_t num_heads = std::min<int64_t>(pick(kSizes, bytes.next()), num_tokens > 5 ? 3 : 40);
  const int64_t head_size =
      std::min<int64_t>(pick(kSizes, bytes.next()), std::max(num_tokens, num_heads) > 5 ? 9 : 40);
  const uint8_t count = bytes.next();
  message_size = bytes.next();
  const uint8_t seed = bytes.next(), more_seed = bytes.next(), oddity = bytes.next();

  args.has_prefill_tokens_with_context = count != 0;
  args.prefill_tokens_with_context = (count - 1) % (num_tokens + 1);
  const bool quantizes = dtypes.input != dtypes.output;
  const bool may_scale = is_fp8(dtypes.output);
  operands[kOutputScale].given = may_scale && (quantizes || (flags & 1));
  operands[kOutputLse].given = !(flags & 2);
  describe_operands(*this, dtypes, {num_tokens, num_heads, head_size});

  add_region(regions, kSharedBytes);
  uint8_t declared[kRoles];
  for (int i = 0; i < kRoles; ++i) {
    read_strides(operands[i], bytes);
    point_view(operands[i]);
    place(regions, operands[i], bytes, [&](uint8_t byte) { return partner(*this, i, byte); });
    declared[i] = bytes.next();
  }
  for (int i = 0; i < 3; ++i) apply_fault(*this, bytes);
  resize_all(*this, bytes);
  for (int i = 0; i < kRoles; ++i)
    declare_memory(regions[operands[i].region], operands[i].view, declared[i]);

  Random random(seed | more_seed << 8);
  fill(regions, random);
  for (int i = 0; i < kRoles; ++i) {
    const bool is_lse = i == kPrefixLse || i == kSuffixLse;
    fill(regions, operands[i], is_lse, oddity, random);
  }
  for (Region& region : regions) {
    region.before.assign(region.bytes.get(), region.bytes.get() + region.size);
  }
  pass_args(*this);
}

}  // namespace merge_attn_states::fuzz
