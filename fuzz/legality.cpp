#include "legality.h"

#include <algorithm>
#include <cstddef>
#include <vector>

#include "values.h"

namespace merge_attn_states::fuzz {
namespace {

using Names = std::set<std::string>;

constexpr Role kRequired[] = {kOutput, kPrefixOutput, kPrefixLse, kSuffixOutput, kSuffixLse};

std::vector<Role> given(const Call& call) {
  std::vector<Role> roles;
  for (int i = 0; i < kRoles; ++i) {
    if (call.operands[i].given) roles.push_back(static_cast<Role>(i));
  }
  return roles;
}

// What every caller's struct has, in bytes: up to its first optional field.
constexpr size_t kSmallestTensor = offsetof(merge_attn_states_tensor, memory);
constexpr size_t kSmallestArgs = offsetof(merge_attn_states_args, prefill_tokens_with_context);

template <class Struct>
bool is_of_a_known_version(const Passed<Struct>& passed, size_t smallest) {
  const bool asks_for_more = passed.size > sizeof(Struct) && passed.behind != 0;
  return passed.size >= smallest && passed.size <= kLargestStruct && !asks_for_more;
}

Names of_no_known_version(const Call& call) {
  if (!is_of_a_known_version(call.passed, kSmallestArgs)) return {"args"};
  Names names;
  for (Role role : given(call)) {
    if (!is_of_a_known_version(call.operands[role].passed, kSmallestTensor)) {
      names.insert(kNames[role]);
    }
  }
  return names;
}

Names undescribed(const Call& call) {
  Names names;
  for (Role role : kRequired) {
    if (!call.operands[role].given) names.insert(kNames[role]);
  }
  for (Role role : given(call)) {
    const auto& view = call.view(role);
    if (view.rank < 0 || (view.rank > 0 && (!view.sizes || !view.strides))) {
      names.insert(kNames[role]);
    }
  }
  return names;
}

bool is_output_described(const Call& call) {
  const auto& output = call.view(kOutput);
  return output.rank == 3 && output.sizes[0] >= 0 && output.sizes[1] >= 0 && output.sizes[2] >= 0 &&
         (output.device_type == MERGE_ATTN_STATES_CPU ||
          output.device_type == MERGE_ATTN_STATES_CUDA);
}

std::vector<int64_t> shape_of(const Call& call, Role role) {
  const int64_t* sizes = call.view(kOutput).sizes;
  switch (role) {
    case kOutput:
    case kPrefixOutput:
    case kSuffixOutput:
      return {sizes[0], sizes[1], sizes[2]};
    case kOutputScale:
      return std::vector<int64_t>(call.view(role).rank, 1);
    default:
      return {sizes[1], sizes[0]};
  }
}

// FP8 is made of it, and it of FP8.
bool converts(uint32_t dtype) {
  return dtype == MERGE_ATTN_STATES_FLOAT32 || dtype == MERGE_ATTN_STATES_FLOAT16 ||
         dtype == MERGE_ATTN_STATES_BFLOAT16;
}

bool fits_dtype(const Call& call, Role role) {
  const uint32_t input = call.view(kPrefixOutput).dtype, output = call.view(kOutput).dtype;
  const uint32_t dtype = call.view(role).dtype;
  switch (role) {
    case kPrefixOutput:
      return is_known(dtype);
    case kSuffixOutput:
      return dtype == input;
    case kOutput:
      return dtype == input || (is_fp8(dtype) && converts(input)) ||
             (is_fp8(input) && converts(dtype));
    case kOutputScale:
      return dtype == MERGE_ATTN_STATES_FLOAT32 && is_fp8(output);
    default:
      return dtype == (input == MERGE_ATTN_STATES_FLOAT64 ? MERGE_ATTN_STATES_FLOAT64
                                                          : MERGE_ATTN_STATES_FLOAT32);
  }
}

Names misfits(const Call& call) {
  Names names;
  const auto& output = call.view(kOutput);
  for (Role role : given(call)) {
    const auto& view = call.view(role);
    const bool fits =
        std::vector<int64_t>(view.sizes, view.sizes + view.rank) == shape_of(call, role) &&
        fits_dtype(call, role) && view.device_type == output.device_type &&
        (view.device_type == MERGE_ATTN_STATES_CPU || view.device_index == output.device_index);
    if (!fits) names.insert(kNames[role]);
  }
  const bool quantizes = is_fp8(output.dtype) && output.dtype != call.view(kPrefixOutput).dtype;
  if (quantizes && !call.operands[kOutputScale].given) names.insert(kNames[kOutputScale]);
  const int64_t count = call.args.prefill_tokens_with_context;
  if (call.args.has_prefill_tokens_with_context && (count < 0 || count > output.sizes[0])) {
    names.insert("prefill_tokens_with_context");
  }
  return names;
}

Names misplaced(const Call& call) {
  Names names;
  for (Role role : given(call)) {
    const auto& view = call.view(role);
    if (is_empty(view)) continue;
    const bool aligned = reinterpret_cast<uintptr_t>(view.data) % bytes_of(view.dtype) == 0;
    const bool told = view.memory_bytes == 0 ||
                      (view.memory_bytes > 0 && is_inside(view, view.memory, view.memory_bytes));
    if (view.data == nullptr || !aligned || !told) names.insert(kNames[role]);
  }
  return names;
}

bool is_same(const merge_attn_states_tensor& a, const merge_attn_states_tensor& b) {
  bool same = a.data == b.data && a.dtype == b.dtype && a.rank == b.rank;
  for (int32_t i = 0; same && i < a.rank; ++i) {
    same = a.sizes[i] == b.sizes[i] && (a.sizes[i] == 1 || a.strides[i] == b.strides[i]);
  }
  return same;
}

// More elements than bytes: some byte is met twice.
bool is_crowded(const Call& call, Role role) {
  const auto& view = call.view(role);
  __int128 count = 1;
  for (int32_t i = 0; i < view.rank; ++i) {
    count = std::min(count * view.sizes[i], __int128(1) << 64);
  }
  return count > static_cast<__int128>(call.regions[call.operands[role].region].size);
}

// Marks the bytes of a view in its region; false where one is met twice.
bool mark(const Call& call, Role role, std::vector<uint8_t>& marks) {
  const auto& view = call.view(role);
  const Region& region = call.regions[call.operands[role].region];
  marks.assign(region.size, false);
  if (is_empty(view)) return true;
  bool once = true;
  for_each_element(view, [&](int64_t, int64_t, int64_t, const uint8_t* address) {
    for (int64_t i = 0; i < bytes_of(view.dtype); ++i) {
      uint8_t& marked = marks[address + i - region.bytes.get()];
      once = once && !marked;
      marked = 1;
    }
  });
  return once;
}

bool meets(const Call& call, Role role, Role other, const std::vector<uint8_t>& marks) {
  if (call.operands[role].region != call.operands[other].region) return false;
  std::vector<uint8_t> others;
  mark(call, other, others);
  for (size_t i = 0; i < marks.size(); ++i) {
    if (marks[i] && others[i]) return true;
  }
  return false;
}

Names overlapping(const Call& call) {
  Names names;
  // Otherwise no operand has more elements than can be looked at.
  for (Role written : {kOutput, kOutputLse}) {
    const bool written_to = call.operands[written].given && !is_empty(call.view(written));
    if (written_to && is_crowded(call, written)) return {kNames[kOutput], kNames[kOutputLse]};
  }
  std::vector<uint8_t> marks;
  for (Role written : {kOutput, kOutputLse}) {
    if (!call.operands[written].given || is_empty(call.view(written))) continue;
    if (!mark(call, written, marks)) names.insert(kNames[written]);
    const Role partners[] = {written == kOutput ? kPrefixOutput : kPrefixLse,
                             written == kOutput ? kSuffixOutput : kSuffixLse};
    for (Role other : given(call)) {
      if (other == written) continue;
      const bool partner = other == partners[0] || other == partners[1];
      if (partner && is_same(call.view(written), call.view(other))) continue;
      if (meets(call, written, other, marks)) names.insert(kNames[written]);
    }
  }
  return names;
}

}  // namespace

Names faulty_arguments(const Call& call) {
  Names names = of_no_known_version(call);
  if (names.empty()) names = undescribed(call);
  if (names.empty() && !is_output_described(call)) names.insert(kNames[kOutput]);
  if (names.empty()) names = misfits(call);
  if (names.empty()) names = misplaced(call);
  if (names.empty()) names = overlapping(call);
  return names;
}

}  // namespace merge_attn_states::fuzz
