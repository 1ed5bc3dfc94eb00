#include "legality.h"

#include <vector>

#include "values.h"

namespace merge_attn_states::fuzz {
namespace {

constexpr Role kRequired[] = {kOutput, kPrefixOutput, kPrefixLse, kSuffixOutput, kSuffixLse};

std::vector<Role> given(const Call& call) {
  std::vector<Role> roles;
  for (int i = 0; i < kRoles; ++i) {
    if (call.operands[i].given) roles.push_back(static_cast<Role>(i));
  }
  return roles;
}

constexpr size_t kSmallestArgs = offsetof(merge_attn_states_args, prefill_tokens_with_context);

Names of_no_known_version(const Call& call) {
  if (!is_of_a_known_version(call.passed, kSmallestArgs)) return {"args"};
  Names names;
  for (Role role : given(call)) {
    if (!is_of_a_known_version(call.operands[role])) names.insert(kNames[role]);
  }
  return names;
}

Names undescribed(const Call& call) {
  Names names;
  for (Role role : kRequired) {
    if (!call.operands[role].given) names.insert(kNames[role]);
  }
  for (Role role : given(call)) {
    if (!is_described(call.view(role))) names.insert(kNames[role]);
  }
  return names;
}

bool is_output_described(const Call& call) {
  const auto& output = call.view(kOutput);
  return output.rank == 3 && output.sizes[0] >= 0 && output.sizes[1] >= 0 && output.sizes[2] >= 0 &&
         is_on_a_device(output);
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
    const bool fits = has_shape(view, shape_of(call, role)) && fits_dtype(call, role) &&
                      is_on_device_of(view, output);
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
    if (!is_well_placed(call.view(role))) names.insert(kNames[role]);
  }
  return names;
}

Names overlapping(const Call& call) {
  Names names;
  // Otherwise no operand has more elements than can be looked at.
  for (Role written : {kOutput, kOutputLse}) {
    const bool written_to = call.operands[written].given && !is_empty(call.view(written));
    if (written_to && is_crowded(call.regions[call.operands[written].region], call.view(written)))
      return {kNames[kOutput], kNames[kOutputLse]};
  }
  std::vector<uint8_t> marks;
  for (Role written : {kOutput, kOutputLse}) {
    if (!call.operands[written].given || is_empty(call.view(written))) continue;
    const Region& region = call.regions[call.operands[written].region];
    if (!mark(region, call.view(written), marks)) names.insert(kNames[written]);
    const Role partners[] = {written == kOutput ? kPrefixOutput : kPrefixLse,
                             written == kOutput ? kSuffixOutput : kSuffixLse};
    for (Role other : given(call)) {
      if (other == written) continue;
      const bool partner = other == partners[0] || other == partners[1];
      if (partner && is_same(call.view(written), call.view(other))) continue;
      const bool apart = &call.regions[call.operands[other].region] != &region;
      if (!apart && meets(region, call.view(other), marks)) names.insert(kNames[written]);
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
