// A fuzz input read as one call of the C entry: the operands, the memory that really holds them,
// and what it held before the call.
//
// Knows the C header alone. Zero bytes give an ordinary call, so that what a mutation changes is
// one property of a call that is otherwise legal.
#pragma once

#include <cstddef>
#include <cstdint>
#include <memory>
#include <vector>

#include "../include/merge_attn_states.h"

namespace merge_attn_states::fuzz {

enum Role {
  kPrefixOutput,
  kSuffixOutput,
  kPrefixLse,
  kSuffixLse,
  kOutputScale,
  kOutput,
  kOutputLse,
  kRoles
};

inline constexpr const char* kNames[kRoles] = {"prefix_output", "suffix_output", "prefix_lse",
                                               "suffix_lse",    "output_scale",  "output",
                                               "output_lse"};

// One allocation of exactly `size` bytes: AddressSanitizer guards its ends, `before` what lies
// between the elements.
struct Region {
  std::unique_ptr<uint8_t[]> bytes;
  size_t size;
  std::vector<uint8_t> before;
};

// A struct as its caller hands it over, who may have been compiled against another header: in
// memory of exactly that size, so that a read behind it is seen.
template <class Struct>
struct Passed {
  size_t size = sizeof(Struct);
  uint8_t behind = 0;  // each byte that this library's struct does not have
  std::unique_ptr<uint8_t[]> bytes;

  const Struct* get() const { return reinterpret_cast<const Struct*>(bytes.get()); }
};

struct Operand {
  bool given = true;
  int region = 0;
  std::vector<int64_t> sizes, strides;
  merge_attn_states_tensor view{};  // what the library must see of what is passed
  Passed<merge_attn_states_tensor> passed;
};

// Offsets in bytes from `data` that an operand touches: [low, high).
struct Extent {
  __int128 low;
  __int128 high;
};

struct Call {
  Call(const uint8_t* data, size_t size);
  Call(const Call&) = delete;  // args points into operands

  std::vector<Region> regions;  // [0] is shared, each other belongs to one operand at first
  Operand operands[kRoles];
  merge_attn_states_args args{};  // what the library must see of what is passed
  Passed<merge_attn_states_args> passed;
  size_t selection_size = sizeof(merge_attn_states_selection);
  size_t message_size = 0;
  bool on_cuda = false;

  const merge_attn_states_tensor& view(Role role) const { return operands[role].view; }
};

int64_t bytes_of(uint32_t dtype);
bool is_empty(const merge_attn_states_tensor& view);
Extent extent_of(const merge_attn_states_tensor& view);

// Does every element lie in `size` bytes at `memory`?
bool is_inside(const merge_attn_states_tensor& view, const void* memory, int64_t size);

// Calls f(i, j, k, address) for each element of a view of up to three dimensions.
template <class F>
void for_each_element(const merge_attn_states_tensor& view, F&& f) {
  int64_t sizes[3] = {1, 1, 1}, strides[3] = {0, 0, 0};
  for (int32_t i = 0; i < view.rank && i < 3; ++i) {
    sizes[i] = view.sizes[i];
    strides[i] = view.sizes[i] == 1 ? 0 : view.strides[i];
  }
  if (is_empty(view)) return;  // the other sizes may be anything
  const int64_t bytes = bytes_of(view.dtype);
  for (int64_t i = 0; i < sizes[0]; ++i) {
    for (int64_t j = 0; j < sizes[1]; ++j) {
      for (int64_t k = 0; k < sizes[2]; ++k) {
        const int64_t offset = i * strides[0] + j * strides[1] + k * strides[2];
        f(i, j, k, static_cast<uint8_t*>(view.data) + offset * bytes);
      }
    }
  }
}

}  // namespace merge_attn_states::fuzz
