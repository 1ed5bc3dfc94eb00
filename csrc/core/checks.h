// The checks of one operand alone or beside another one. With validate.cpp, which says what each
// operand of the operation must be, this is the only validation.
//
// A check is a short test, inlined, and a cold lambda with its sentence: a legal call pays for a
// run of compares and touches no text.
#pragma once

#include <array>
#include <string>

#include "dtypes.h"
#include "footprint.h"
#include "operands.h"
#include "refuse.h"

namespace merge_attn_states {

struct Operand {
  Name name = "";
  int address_rank = 0;              // dimensions that its address depends on
  const TensorView* view = nullptr;  // null: not given
  Extent extent{};                   // set by check_memory

  bool given() const { return view != nullptr; }
  DType dtype() const { return static_cast<DType>(view->dtype); }
  int64_t size(int i) const { return view->sizes[i]; }
  int64_t stride(int i) const { return view->sizes[i] == 1 ? 0 : view->strides[i]; }

  std::string sizes() const { return list(view->sizes, view->rank); }
  std::string layout() const {
    return "sizes " + sizes() + " with strides " + list(view->strides, view->rank);
  }
};

inline void check_described(const Operand& operand) {
  const TensorView& view = *operand.view;
  if (view.rank < 0 || (view.rank > 0 && (view.sizes == nullptr || view.strides == nullptr))) {
    refuse(operand.name, [&] {
      return "expected a rank of 0 or more with its sizes and strides, got rank " +
             std::to_string(view.rank) + (view.rank < 0 ? "" : " and a null pointer to them");
    });
  }
}

inline void check_rank(const Operand& operand, int rank, const char* axes) {
  if (operand.view->rank != rank) {
    refuse(operand.name, [&] {
      return "expected " + std::to_string(rank) + " dimensions " + axes + ", got " +
             std::to_string(operand.view->rank) + ": " + operand.sizes();
    });
  }
}

// `of_output` are the dimensions of the output that the operand's own have to equal.
template <int... of_output>
void check_shape(const Operand& operand, const Operand& output, const char* axes) {
  check_rank(operand, sizeof...(of_output), axes);
  int i = 0;
  if (!(... && (operand.size(i++) == output.size(of_output)))) {
    refuse(operand.name, [&operand, &output, axes] {
      const std::array<int64_t, sizeof...(of_output)> expected{output.size(of_output)...};
      return "expected shape " + list(expected.data(), expected.size()) + " = " + axes + ", got " +
             operand.sizes();
    });
  }
}

inline void check_one_element(const Operand& operand) {
  for (int32_t i = 0; i < operand.view->rank; ++i) {
    if (operand.size(i) != 1) {
      refuse(operand.name, [&] { return "expected one element, got shape " + operand.sizes(); });
    }
  }
}

inline void check_device_kind(const Operand& operand) {
  const TensorView& view = *operand.view;
  if (view.device_type != MERGE_ATTN_STATES_CPU && view.device_type != MERGE_ATTN_STATES_CUDA) {
    refuse(operand.name, [&] {
      return "expected a CPU or CUDA device, got " +
             device_name(view.device_type, view.device_index);
    });
  }
}

inline void check_device(const Operand& operand, const TensorView& output, Name of) {
  const TensorView& view = *operand.view;
  const bool indexed = view.device_type != MERGE_ATTN_STATES_CPU;  // there is one CPU
  if (view.device_type != output.device_type ||
      (indexed && view.device_index != output.device_index)) {
    refuse(operand.name, [&] {
      return "expected device " + device_name(output.device_type, output.device_index) +
             ", the device of " + of.str() + ", got " +
             device_name(view.device_type, view.device_index);
    });
  }
}

inline void check_supported(const Operand& operand) {
  if (!is_supported(operand.dtype())) {
    refuse(operand.name, [&] {
      return "expected float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2, got " +
             dtype_name(operand.view->dtype);
    });
  }
}

inline void check_dtype(const Operand& operand, DType expected, const char* why) {
  if (operand.dtype() != expected) {
    refuse(operand.name, [&operand, expected, why] {
      return "expected " + dtype_name(static_cast<uint32_t>(expected)) + ", " + why + ", got " +
             dtype_name(operand.view->dtype);
    });
  }
}

// One element may have any rank; its strides mean nothing.
constexpr int address_rank(Axes axes) {
  return axes == Axes::kRows ? 3 : axes == Axes::kLses ? 2 : 0;
}

// Elements that lie in the memory that is said to hold them, and are aligned to their size.
inline void check_elements(const Operand& operand) {
  const TensorView& view = *operand.view;
  const Extent& extent = operand.extent;
  const int64_t bytes = size_of(operand.dtype());
  const uint64_t address = reinterpret_cast<uintptr_t>(view.data);
  if (address == 0) {
    refuse(operand.name, [] { return "expected memory, got a null data pointer"; });
  }
  if ((address & (bytes - 1)) != 0) {  // a power of two
    refuse(operand.name, [&view, bytes, address] {
      return "expected an address that is a multiple of " + std::to_string(bytes) +
             " bytes, the size of " + dtype_name(view.dtype) + ", got " + std::to_string(address);
    });
  }
  if (view.memory_bytes == 0) return;
  const uint64_t begin = reinterpret_cast<uintptr_t>(view.memory);
  if (view.memory_bytes < 0 || extent.begin < begin ||
      extent.end - begin > static_cast<uint64_t>(view.memory_bytes)) {
    refuse(operand.name, [&] {
      return "expected elements inside its memory of " + std::to_string(view.memory_bytes) +
             " bytes, got " + operand.layout() + " that reach outside";
    });
  }
}

inline void check_extent(const Operand& operand, bool found) {
  if (!found) {
    refuse(operand.name,
           [&] { return "expected elements within 64-bit addresses, got " + operand.layout(); });
  }
}

inline void check_memory(Operand& operand, int rank) {
  const TensorView& view = *operand.view;
  check_extent(operand, find_extent(view.data, view.sizes, view.strides, rank,
                                    size_of(operand.dtype()), operand.extent));
  if (!operand.extent.empty()) check_elements(operand);
}

// Not inlined: in an engine a call finds its code outside the processor's first cache, and short
// code is sooner there.
template <Axes axes>
[[gnu::noinline]] void check_memory(Operand& operand) {
  check_memory(operand, address_rank(axes));
}

// Same memory, same strides: then each row's values are read and written by one thread.
inline bool is_same(const Operand& a, const Operand& b) {
  if (a.view->data != b.view->data || a.dtype() != b.dtype()) return false;
  if (a.address_rank != b.address_rank) return false;
  for (int i = 0; i < a.address_rank; ++i) {
    if (a.size(i) != b.size(i) || a.stride(i) != b.stride(i)) return false;
  }
  return true;
}

inline Footprint footprint(const Operand& operand) {
  const TensorView& view = *operand.view;
  return footprint(operand.extent, view.sizes, view.strides, operand.address_rank,
                   size_of(operand.dtype()));
}

inline void check_written_once(const Operand& written, int rank) {
  const TensorView& view = *written.view;
  if (written.extent.empty() || nests(view.sizes, view.strides, rank)) return;
  if (!overlaps_itself(footprint(written))) return;
  refuse(written.name, [&] {
    return "expected memory of its own for each element, got " + written.layout() +
           " that overlap themselves";
  });
}

// For two operands within one range of addresses.
[[gnu::noinline]] inline void check_sharing(const Operand& written, const Operand& other,
                                            bool may_be_same) {
  if (may_be_same && is_same(written, other)) return;
  const bool shares_first_element = written.view->data == other.view->data;
  if (!shares_first_element && !overlaps(footprint(written), footprint(other))) return;
  refuse(written.name, [&] {
    return std::string("expected no memory in common with ") + other.name.str() +
           (may_be_same ? " or exactly its memory with its strides, got a partial overlap"
                        : ", got an overlap");
  });
}

// What is not given touches nothing.
inline void check_overlap(const Operand& written, const Operand& other, bool may_be_same) {
  if (written.extent.overlaps_range(other.extent)) check_sharing(written, other, may_be_same);
}

}  // namespace merge_attn_states
