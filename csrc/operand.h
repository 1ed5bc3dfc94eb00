// One operand of a call, and the checks that concern it alone or beside another one. With
// merge_args.cpp, which says what each operand of the operation must be, this is the only
// validation.
#pragma once

#include <array>
#include <stdexcept>
#include <string>

#include "dtypes.h"
#include "footprint.h"
#include "tensor_view.h"

namespace merge_attn_states {

[[noreturn]] inline void refuse(const char* name, const std::string& sentence) {
  throw std::invalid_argument(std::string(name) + ": " + sentence);
}

// One operand under its name, with the bytes that it touches.
struct Operand {
  const char* name;
  const TensorView* view;  // null: not given
  Footprint memory{};

  int64_t size(int i) const { return view->sizes[i]; }
  int64_t stride(int i) const { return view->sizes[i] == 1 ? 0 : view->strides[i]; }
  DType dtype() const { return static_cast<DType>(view->dtype); }
  bool given() const { return view != nullptr; }
};

inline void check_described(const Operand& operand) {
  const TensorView& view = *operand.view;
  if (view.rank < 0 || (view.rank > 0 && (view.sizes == nullptr || view.strides == nullptr))) {
    refuse(operand.name, "expected a rank of 0 or more with its sizes and strides, got rank " +
                             std::to_string(view.rank));
  }
}

inline void check_rank(const Operand& operand, int rank, const char* axes) {
  if (operand.view->rank != rank) {
    refuse(operand.name, "expected " + std::to_string(rank) + " dimensions " + axes + ", got " +
                             std::to_string(operand.view->rank) + ": " +
                             list(operand.view->sizes, operand.view->rank));
  }
}

template <size_t rank>
void check_shape(const Operand& operand, const std::array<int64_t, rank>& expected,
                 const char* axes) {
  check_rank(operand, rank, axes);
  for (size_t i = 0; i < rank; ++i) {
    if (operand.size(i) != expected[i]) {
      refuse(operand.name, "expected shape " + list(expected.data(), rank) + " = " + axes +
                               ", got " + list(operand.view->sizes, rank));
    }
  }
}

inline void check_device(const Operand& operand, const TensorView& output) {
  const TensorView& view = *operand.view;
  const bool indexed = view.device_type != MERGE_ATTN_STATES_CPU;  // there is one CPU
  if (view.device_type != output.device_type ||
      (indexed && view.device_index != output.device_index)) {
    refuse(operand.name, "expected device " + device_name(output.device_type, output.device_index) +
                             ", the device of output, got " +
                             device_name(view.device_type, view.device_index));
  }
}

inline void check_dtype(const Operand& operand, DType expected, const char* why) {
  if (operand.dtype() != expected) {
    refuse(operand.name, "expected " + dtype_name(static_cast<uint32_t>(expected)) + ", " + why +
                             ", got " + dtype_name(operand.view->dtype));
  }
}

// Elements that exist, lie in the memory that is said to hold them, and are aligned to their size.
inline void check_memory(Operand& operand) {
  const TensorView& view = *operand.view;
  const int64_t bytes = size_of(operand.dtype());
  const bool scalar = view.rank > kMaxRank;  // output_scale: any number of dimensions of size 1
  const auto memory = footprint(view.data, view.sizes, view.strides, scalar ? 0 : view.rank, bytes);
  if (!memory) {
    refuse(operand.name, "expected elements within 64-bit addresses, got sizes " +
                             list(view.sizes, view.rank) + " with strides " +
                             list(view.strides, view.rank));
  }
  operand.memory = *memory;
  if (memory->empty()) return;
  if (view.data == nullptr) refuse(operand.name, "expected memory, got a null data pointer");
  if (reinterpret_cast<uintptr_t>(view.data) % bytes != 0) {
    refuse(operand.name, "expected an address that is a multiple of " + std::to_string(bytes) +
                             " bytes, the size of " + dtype_name(view.dtype) + ", got " +
                             std::to_string(reinterpret_cast<uintptr_t>(view.data)));
  }
  if (view.memory_bytes == 0) return;
  const uint64_t begin = reinterpret_cast<uintptr_t>(view.memory);
  if (view.memory_bytes < 0 || memory->begin < begin ||
      memory->end - begin > static_cast<uint64_t>(view.memory_bytes)) {
    refuse(operand.name, "expected elements inside its memory of " +
                             std::to_string(view.memory_bytes) + " bytes, got sizes " +
                             list(view.sizes, view.rank) + " with strides " +
                             list(view.strides, view.rank) + " that reach outside");
  }
}

// Same memory, same strides: then each row's values are read and written by one thread.
inline bool is_same(const Operand& a, const Operand& b) {
  if (a.view->data != b.view->data || a.dtype() != b.dtype()) return false;
  for (int i = 0; i < a.view->rank; ++i) {
    if (a.size(i) != b.size(i) || a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

inline void check_written_once(const Operand& written) {
  if (overlaps_itself(written.memory)) {
    refuse(written.name, "expected memory of its own for each element, got sizes " +
                             list(written.view->sizes, written.view->rank) + " with strides " +
                             list(written.view->strides, written.view->rank) +
                             " that overlap themselves");
  }
}

inline void check_overlap(const Operand& written, const Operand& other, bool may_be_same) {
  if (!other.given() || !overlaps(written.memory, other.memory)) return;
  if (may_be_same && is_same(written, other)) return;
  refuse(written.name,
         std::string("expected no memory in common with ") + other.name +
             (may_be_same ? " or exactly its memory with its strides, got a partial overlap"
                          : ", got an overlap"));
}

}  // namespace merge_attn_states
