// The border: what a translator hands over and what it looks like in a message.
//
// A TensorView is the C entry's own tensor struct. In front of it stand the translators
// (torch/ops.cpp, torch/eager.cpp); behind it plain C++ and CUDA that know neither Torch nor
// Python.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>

#include "../../include/merge_attn_states.h"

namespace merge_attn_states {

using TensorView = merge_attn_states_tensor;

// What every caller's struct holds; none of its fields may hide in padding at the end.
inline constexpr size_t kSmallestTensor = offsetof(TensorView, memory);
static_assert(sizeof(TensorView) == offsetof(TensorView, memory_bytes) + sizeof(int64_t));

// Says where the view's memory begins, `offset_bytes` before its data, and how much it is. False
// where there is none, freed or never there: then the view has no data either, which is refused
// where an element is to be read.
inline bool set_memory(TensorView& view, int64_t offset_bytes, int64_t memory_bytes) {
  // Addresses as numbers: behind an offset, a storage without memory has a pointer beside null.
  const uintptr_t memory = reinterpret_cast<uintptr_t>(view.data) - offset_bytes;
  const bool exists = view.data != nullptr && memory != 0 && memory_bytes != 0;
  if (!exists) view.data = nullptr;
  view.memory = exists ? reinterpret_cast<const void*>(memory) : nullptr;
  view.memory_bytes = exists ? memory_bytes : 0;
  return exists;
}

// "float32", "int64", "bool", or "dtype code 99" for one that DLPack does not name.
std::string dtype_name(uint32_t dtype);

// "cpu", "cuda:1", or "device type 8".
std::string device_name(int32_t device_type, int32_t device_index);

// "[2, 4]"
std::string list(const int64_t* values, int32_t count);

}  // namespace merge_attn_states
