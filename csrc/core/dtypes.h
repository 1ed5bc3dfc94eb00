// The one list of supported dtypes: codes, storage types, and the way from one to the other.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <type_traits>

#include "../../include/merge_attn_states.h"

namespace merge_attn_states {

enum class DType : uint32_t {
  kFloat32 = MERGE_ATTN_STATES_FLOAT32,
  kFloat16 = MERGE_ATTN_STATES_FLOAT16,
  kBFloat16 = MERGE_ATTN_STATES_BFLOAT16,
  kFloat64 = MERGE_ATTN_STATES_FLOAT64,
  kFloat8E4M3 = MERGE_ATTN_STATES_FLOAT8_E4M3FN,
  kFloat8E5M2 = MERGE_ATTN_STATES_FLOAT8_E5M2,
};

// Storage alone: how bits become floats is the business of cpu/pack.h and cuda/pack.cuh.
struct Half {
  uint16_t bits;
};
struct BFloat16 {
  uint16_t bits;
};
struct Float8E4M3 {
  uint8_t bits;
};
struct Float8E5M2 {
  uint8_t bits;
};

constexpr bool is_fp8(DType dtype) {
  return dtype == DType::kFloat8E4M3 || dtype == DType::kFloat8E5M2;
}

constexpr bool is_supported(DType dtype) {
  return is_fp8(dtype) || dtype == DType::kFloat32 || dtype == DType::kFloat16 ||
         dtype == DType::kBFloat16 || dtype == DType::kFloat64;
}

// FP8 to any wider dtype and back; float64 stays by itself. dispatch_dtypes has the same pairs.
constexpr bool can_convert(DType input, DType output) {
  const auto converts = [](DType dtype) { return is_supported(dtype) && dtype != DType::kFloat64; };
  return converts(input) && converts(output) && is_fp8(input) != is_fp8(output);
}

constexpr int64_t size_of(DType dtype) { return (static_cast<uint32_t>(dtype) >> 8 & 0xff) / 8; }

template <class T>
inline constexpr bool kIsFp8 = false;
template <>
inline constexpr bool kIsFp8<Float8E4M3> = true;
template <>
inline constexpr bool kIsFp8<Float8E5M2> = true;

// What a row is computed in; an LSE is stored in it too.
template <class T>
struct Accumulate {
  using type = float;
};
template <>
struct Accumulate<double> {
  using type = double;
};

template <class T>
struct TypeTag {
  using type = T;
};

// Calls f(TypeTag<In>, TypeTag<Out>) for one pair of the dtype table. Validation has refused every
// other pair, so reaching the end is a bug of this library.
template <class F>
auto dispatch_dtypes(DType input, DType output, F&& f) {
  const auto with_output = [&](auto in) {
    if (input == output) return f(in, in);
    using In = typename decltype(in)::type;
    if constexpr (kIsFp8<In>) {
      if (output == DType::kFloat32) return f(in, TypeTag<float>{});
      if (output == DType::kFloat16) return f(in, TypeTag<Half>{});
      if (output == DType::kBFloat16) return f(in, TypeTag<BFloat16>{});
    } else if constexpr (!std::is_same_v<In, double>) {
      if (output == DType::kFloat8E4M3) return f(in, TypeTag<Float8E4M3>{});
      if (output == DType::kFloat8E5M2) return f(in, TypeTag<Float8E5M2>{});
    }
    throw std::logic_error("merge_attn_states: no kernel for this pair of dtypes");
  };
  switch (input) {
    case DType::kFloat32:
      return with_output(TypeTag<float>{});
    case DType::kFloat16:
      return with_output(TypeTag<Half>{});
    case DType::kBFloat16:
      return with_output(TypeTag<BFloat16>{});
    case DType::kFloat64:
      return with_output(TypeTag<double>{});
    case DType::kFloat8E4M3:
      return with_output(TypeTag<Float8E4M3>{});
    case DType::kFloat8E5M2:
      return with_output(TypeTag<Float8E5M2>{});
  }
  throw std::logic_error("merge_attn_states: unknown dtype");
}

// Those that many parts mix freely.
constexpr bool is_float(DType dtype) {
  return dtype == DType::kFloat32 || dtype == DType::kFloat16 || dtype == DType::kBFloat16;
}

template <class F>
auto dispatch_floats(DType dtype, F&& f) {
  switch (dtype) {
    case DType::kFloat32:
      return f(TypeTag<float>{});
    case DType::kFloat16:
      return f(TypeTag<Half>{});
    case DType::kBFloat16:
      return f(TypeTag<BFloat16>{});
    default:
      throw std::logic_error("merge_attn_states: no kernel for this dtype");
  }
}

}  // namespace merge_attn_states
