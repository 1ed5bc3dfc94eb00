// Reads a call from bytes. Every field has a fixed place, so that a mutation is a local change.
#include "call.h"

#include <algorithm>
#include <cstring>

#include "legality.h"
#include "place.h"
#include "values.h"

namespace merge_attn_states::fuzz {
namespace {

// 8 is one pack of the CPU kernel, 16 a tile of tokens, 32 one of heads; most are small, for speed.
constexpr int64_t kSizes[] = {2, 1, 3, 0, 1, 4, 2, 5, 3, 7, 8, 9, 16, 17, 24, 33};

struct DTypes {
  uint32_t input, output;
};

constexpr uint32_t kF32 = MERGE_ATTN_STATES_FLOAT32, kF16 = MERGE_ATTN_STATES_FLOAT16,
                   kBF16 = MERGE_ATTN_STATES_BFLOAT16, kF64 = MERGE_ATTN_STATES_FLOAT64,
                   kE4M3 = MERGE_ATTN_STATES_FLOAT8_E4M3FN, kE5M2 = MERGE_ATTN_STATES_FLOAT8_E5M2;
// The pairs that are legal; faults make the others.
constexpr DTypes kDTypes[] = {
    {kF32, kF32},  {kF16, kF16},  {kBF16, kBF16}, {kF64, kF64},  {kE4M3, kE4M3}, {kE5M2, kE5M2},
    {kF32, kE4M3}, {kF32, kE5M2}, {kF16, kE4M3},  {kF16, kE5M2}, {kBF16, kE4M3}, {kBF16, kE5M2},
    {kE4M3, kF32}, {kE5M2, kF32}, {kE4M3, kF16},  {kE5M2, kF16}, {kE4M3, kBF16}, {kE5M2, kBF16}};
constexpr uint32_t kAnyDType[] = {kF32,
                                  kF16,
                                  kBF16,
                                  kF64,
                                  kE4M3,
                                  kE5M2,
                                  0,
                                  ~0u,
                                  MERGE_ATTN_STATES_DTYPE(0, 32),
                                  MERGE_ATTN_STATES_DTYPE(2, 8),
                                  MERGE_ATTN_STATES_DTYPE(6, 8),
                                  MERGE_ATTN_STATES_DTYPE(17, 4),
                                  MERGE_ATTN_STATES_DTYPE(18, 8),
                                  kF32 & 0xffff,
                                  kF32 + (1u << 16),
                                  MERGE_ATTN_STATES_DTYPE(5, 64)};

template <class T, size_t n>
const T& pick(const T (&table)[n], uint8_t byte) {
  return table[byte % n];
}

// A caller of an older or a newer header, or one that left struct_size as it was.
void resize_struct(Call& call, uint8_t which, int8_t difference, int64_t number) {
  const auto size = [&](size_t ours) {
    return difference == 0 ? static_cast<size_t>(number) : ours + difference;
  };
  const auto resize = [&](auto& passed) {
    passed.size = size(passed.size);
    passed.behind = static_cast<uint8_t>(number);
  };
  const int target = which % (kRoles + 2);
  if (target < kRoles) return resize(call.operands[target].passed);
  if (target == kRoles) return resize(call.passed);
  call.selection_size = size(call.selection_size);
}

// One property of one operand, or of the call, is made odd.
void apply_fault(Call& call, Bytes& bytes) {
  const uint8_t kind = bytes.next(), which = bytes.next(), index = bytes.next();
  const int64_t number = bytes.odd_number();
  Operand& operand = call.operands[which % kRoles];
  const size_t at = operand.sizes.empty() ? 0 : index % operand.sizes.size();
  switch (kind % 16) {
    case 1:
      operand.given = !operand.given;
      break;
    case 2:
      operand.sizes.resize(index % 9, 1), operand.strides.resize(index % 9, 1);
      // Exactly as long as the rank, so that reading past it is seen.
      operand.sizes.shrink_to_fit(), operand.strides.shrink_to_fit();
      point_view(operand);
      break;
    case 3:
      if (!operand.sizes.empty()) operand.sizes[at] = number;
      break;
    case 4:
      if (!operand.strides.empty()) operand.strides[at] = number;
      break;
    case 5:
      if (!operand.strides.empty()) operand.strides[at] = static_cast<int8_t>(number);
      break;
    case 6:
      operand.view.dtype = pick(kAnyDType, index);
      break;
    case 7:
      operand.view.device_type = index % 20;
      break;
    case 8:
      operand.view.device_index = static_cast<int8_t>(index);
      break;
    case 9:
      operand.view.data = nullptr;
      break;
    case 10:
      operand.view.rank = static_cast<int32_t>(-1 - index);
      break;
    case 11:
      (index & 1 ? operand.view.sizes : operand.view.strides) = nullptr;
      break;
    case 12:
      operand.view.data =
          reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(operand.view.data) + number);
      break;
    case 13:
      resize_struct(call, which, static_cast<int8_t>(index), number);
      break;
    case 14:
      call.args.prefill_tokens_with_context = number;
      break;
    case 15: {  // strides that no tensor has
      uint64_t stride = static_cast<uint64_t>(number);
      for (int64_t& each : operand.strides) each = static_cast<int8_t>(stride += index);
      break;
    }
    default:
      break;
  }
}

// The dense call before anything is odd: its dtypes and shapes.
void describe_operands(Call& call, const DTypes& dtypes, const int64_t (&sizes)[3]) {
  for (int i = 0; i < kRoles; ++i) {
    merge_attn_states_tensor& view = call.operands[i].view;
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

// Copies as much of a struct as is passed; the library must see the rest as 0.
template <class Struct>
void pass(Struct& seen, Passed<Struct>& passed) {
  const size_t held = std::clamp(passed.size, sizeof(size_t), kLargestStruct + 1);
  const size_t known = std::min(held, sizeof(Struct));
  seen.struct_size = passed.size;
  passed.bytes = std::make_unique<uint8_t[]>(held);
  std::memset(passed.bytes.get(), passed.behind, held);
  std::memcpy(passed.bytes.get(), &seen, known);
  std::memset(reinterpret_cast<uint8_t*>(&seen) + known, 0, sizeof(Struct) - known);
}

// What lies outside its memory is always told of it.
void pass_operand(Call& call, Operand& operand) {
  const Region& region = call.regions[operand.region];
  if (!is_inside(operand.view, region.bytes.get(), static_cast<int64_t>(region.size))) {
    operand.passed.size = std::max(operand.passed.size, sizeof(operand.view));
  }
  pass(operand.view, operand.passed);
}

void pass_args(Call& call) {
  for (Operand& operand : call.operands) pass_operand(call, operand);
  const auto given = [&](Role role) {
    return call.operands[role].given ? call.operands[role].passed.get() : nullptr;
  };
  call.args.output = given(kOutput);
  call.args.prefix_output = given(kPrefixOutput);
  call.args.prefix_lse = given(kPrefixLse);
  call.args.suffix_output = given(kSuffixOutput);
  call.args.suffix_lse = given(kSuffixLse);
  call.args.output_lse = given(kOutputLse);
  call.args.output_scale = given(kOutputScale);
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

  add_region(*this, kSharedBytes);
  uint8_t declared[kRoles];
  for (int i = 0; i < kRoles; ++i) {
    read_strides(operands[i], bytes);
    point_view(operands[i]);
    place(*this, static_cast<Role>(i), bytes);
    declared[i] = bytes.next();
  }
  for (int i = 0; i < 3; ++i) apply_fault(*this, bytes);
  resize_all(*this, bytes);
  for (int i = 0; i < kRoles; ++i) declare_memory(*this, operands[i], declared[i]);

  Random random(seed | more_seed << 8);
  fill(*this, random, oddity);
  for (Region& region : regions) {
    region.before.assign(region.bytes.get(), region.bytes.get() + region.size);
  }
  pass_args(*this);
}

}  // namespace merge_attn_states::fuzz
