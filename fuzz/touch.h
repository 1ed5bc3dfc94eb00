// What every call's contract asks of an operand: a struct of a known version, elements that lie
// where they may, and bytes of its own for what is written. Element by element and byte by byte.
#pragma once

#include <set>
#include <string>
#include <vector>

#include "operand.h"

namespace merge_attn_states::fuzz {

using Names = std::set<std::string>;

// `smallest` is what every caller's struct has, in bytes: up to its first optional field.
template <class Struct>
bool is_of_a_known_version(const Passed<Struct>& passed, size_t smallest) {
  const bool asks_for_more = passed.size > sizeof(Struct) && passed.behind != 0;
  return passed.size >= smallest && passed.size <= kLargestStruct && !asks_for_more;
}
inline bool is_of_a_known_version(const Operand& operand) {
  return is_of_a_known_version(operand.passed, offsetof(merge_attn_states_tensor, memory));
}

bool is_described(const merge_attn_states_tensor& view);

// In the memory that it is said to lie in, aligned to its size.
bool is_well_placed(const merge_attn_states_tensor& view);

bool is_on_a_device(const merge_attn_states_tensor& view);
bool is_on_device_of(const merge_attn_states_tensor& view, const merge_attn_states_tensor& other);

bool has_shape(const merge_attn_states_tensor& view, const std::vector<int64_t>& sizes);

// The same memory with the same strides.
bool is_same(const merge_attn_states_tensor& a, const merge_attn_states_tensor& b);

// More elements than bytes: some byte is met twice.
bool is_crowded(const Region& region, const merge_attn_states_tensor& view);

// Marks the bytes of a view in its region; false where one is met twice.
bool mark(const Region& region, const merge_attn_states_tensor& view, std::vector<uint8_t>& marks);

// Does a view in the same region touch a byte that is marked?
bool meets(const Region& region, const merge_attn_states_tensor& view,
           const std::vector<uint8_t>& marks);

}  // namespace merge_attn_states::fuzz
