// What every fuzzed call is made of: operands, the memory that really holds them, and what it held
// before the call.
//
// Knows the C header alone.
#pragma once

#include <algorithm>
#include <array>
#include <cstddef>
#include <cstdint>
#include <cstring>
#include <memory>
#include <string>
#include <vector>

#include "../include/merge_attn_states.h"

namespace merge_attn_states::fuzz {

// What a struct may be, whatever its version: past that its size was never set.
inline constexpr size_t kLargestStruct = 4096;

// Parts, four row dimensions and head_size.
inline constexpr int kMostDimensions = 6;
using Index = std::array<int64_t, kMostDimensions>;

// One allocation of exactly `size` bytes: AddressSanitizer guards its ends, `before` what lies
// between the elements.
struct Region {
  std::unique_ptr<uint8_t[]> bytes;
  size_t size;
  std::vector<uint8_t> before;
};
using Regions = std::vector<Region>;

// A struct as its caller hands it over, who may have been compiled against another header: in
// memory of exactly that size, so that a read behind it is seen.
template <class Struct>
struct Passed {
  size_t size = sizeof(Struct);
  uint8_t behind = 0;  // each byte that this library's struct does not have
  std::unique_ptr<uint8_t[]> bytes;

  const Struct* get() const { return reinterpret_cast<const Struct*>(bytes.get()); }
  // A caller of an older or a newer header, or one that left struct_size as it was.
  void resize(int8_t difference, int64_t number) {
    size = difference == 0 ? static_cast<size_t>(number) : size + difference;
    behind = static_cast<uint8_t>(number);
  }
};

struct Operand {
  std::string name = {};  // in messages
  bool given = true;
  int region = 0;
  std::vector<int64_t> sizes = {}, strides = {};
  merge_attn_states_tensor view{};  // what the library must see of what is passed
  Passed<merge_attn_states_tensor> passed = {};

  const merge_attn_states_tensor* get() const { return given ? passed.get() : nullptr; }
};

// Offsets in bytes from `data` that an operand touches: [low, high).
struct Extent {
  __int128 low;
  __int128 high;
};

int add_region(Regions& regions, size_t size);

// Lets the view see the operand's sizes and strides.
void point_view(Operand& operand);

int64_t bytes_of(uint32_t dtype);
bool is_empty(const merge_attn_states_tensor& view);
Extent extent_of(const merge_attn_states_tensor& view);

// At most 2^64.
__int128 count_of(const merge_attn_states_tensor& view);

// Does every element lie in `size` bytes at `memory`?
bool is_inside(const merge_attn_states_tensor& view, const void* memory, int64_t size);

const uint8_t* address_of(const merge_attn_states_tensor& view, const Index& index);

// Where an element lies in the copy that was made before the call.
const uint8_t* before(const Region& region, const merge_attn_states_tensor& view,
                      const Index& index);

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
void pass(const Regions& regions, Operand& operand);

// Calls f(index, address) for each element of a view; dimensions past kMostDimensions, which a
// scale may have, are 1.
template <class F>
void for_each_element(const merge_attn_states_tensor& view, F&& f) {
  if (is_empty(view)) return;  // the other sizes may be anything
  Index index{};
  for (int32_t at = 0; at >= 0;) {
    f(static_cast<const Index&>(index), const_cast<uint8_t*>(address_of(view, index)));
    for (at = std::min(view.rank, kMostDimensions) - 1; at >= 0 && ++index[at] == view.sizes[at];
         --at)
      index[at] = 0;
  }
}

}  // namespace merge_attn_states::fuzz
