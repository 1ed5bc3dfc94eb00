// Pack<T>: sixteen bytes of T to floats and back, and single elements for the generic kernel. All
// conversions round to nearest even; FP8 saturates to its largest finite value and keeps NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../dtypes.h"
#include "../lse.h"

namespace merge_attn_states::cuda {

// One element of T as what a row is computed in, and two at a time where the hardware converts two.
template <class T>
struct Element;

template <class T>
struct PlainElement {
  static __device__ T load(T value) { return value; }
  static __device__ T store(T value) { return value; }
  static __device__ void load_pair(const T* from, T& first, T& second) {
    first = from[0];
    second = from[1];
  }
  static __device__ void store_pair(T* to, T first, T second) {
    to[0] = first;
    to[1] = second;
  }
};
template <>
struct Element<float> : PlainElement<float> {};
template <>
struct Element<double> : PlainElement<double> {};

template <>
struct Element<Half> {
  static __device__ float load(Half value) {
    return __half2float(__half(__half_raw{.x = value.bits}));
  }
  static __device__ Half store(float value) {
    return {static_cast<__half_raw>(__float2half_rn(value)).x};
  }
  static __device__ void load_pair(const Half* from, float& first, float& second) {
    const float2 pair = __half22float2(__half2(__half2_raw{.x = from[0].bits, .y = from[1].bits}));
    first = pair.x;
    second = pair.y;
  }
  static __device__ void store_pair(Half* to, float first, float second) {
    const __half2_raw pair = __floats2half2_rn(first, second);
    to[0].bits = pair.x;
    to[1].bits = pair.y;
  }
};

template <>
struct Element<BFloat16> {
  static __device__ float load(BFloat16 value) {
    return __uint_as_float(uint32_t(value.bits) << 16);
  }
  static __device__ BFloat16 store(float value) {
    return {static_cast<__nv_bfloat16_raw>(__float2bfloat16_rn(value)).x};
  }
  static __device__ void load_pair(const BFloat16* from, float& first, float& second) {
    first = load(from[0]);
    second = load(from[1]);
  }
  static __device__ void store_pair(BFloat16* to, float first, float second) {
    const __nv_bfloat162_raw pair = __floats2bfloat162_rn(first, second);
    to[0].bits = pair.x;
    to[1].bits = pair.y;
  }
};

template <class T, __nv_fp8_interpretation_t kFormat>
struct Float8Element {
  static __device__ float load(T value) {
    return __half2float(__half(__nv_cvt_fp8_to_halfraw(value.bits, kFormat)));
  }
  static __device__ T store(float value) {
    return {__nv_cvt_float_to_fp8(value, __NV_SATFINITE, kFormat)};
  }
  static __device__ void load_pair(const T* from, float& first, float& second) {
    first = load(from[0]);
    second = load(from[1]);
  }
  static __device__ void store_pair(T* to, float first, float second) {
    const __nv_fp8x2_storage_t pair =
        __nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, kFormat);
    to[0].bits = pair & 0xff;
    to[1].bits = pair >> 8;
  }
};
template <>
struct Element<Float8E4M3> : Float8Element<Float8E4M3, __NV_E4M3> {};
template <>
struct Element<Float8E5M2> : Float8Element<Float8E5M2, __NV_E5M2> {};

// Stores in one instruction: the compiler splits an assignment of the vector into words.
__device__ inline void store_word(uint4* to, uint4 w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w.x), "r"(w.y), "r"(w.z),
               "r"(w.w)
               : "memory");
}
__device__ inline void store_word(uint2* to, uint2 w) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(w.x), "r"(w.y) : "memory");
}
template <class Word>
__device__ void store_word(Word* to, Word w) {
  *to = w;
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<16> {
  using type = uint4;
};
template <>
struct WordOf<8> {
  using type = uint2;
};
template <>
struct WordOf<4> {
  using type = uint32_t;
};
template <>
struct WordOf<2> {
  using type = uint16_t;
};
template <>
struct WordOf<1> {
  using type = uint8_t;
};

template <class T, int kElements>
struct Pack {
  using Acc = typename Accumulate<T>::type;
  using Word = typename WordOf<sizeof(T) * kElements>::type;
  Word word;

  // Plain loads: an operand may be written by the very kernel that reads it.
  static __device__ Pack load(const T* from) { return {*reinterpret_cast<const Word*>(from)}; }
  __device__ void store(T* to) const { store_word(reinterpret_cast<Word*>(to), word); }

  __device__ void unpack(Acc (&values)[kElements]) const {
    T elements[kElements];
    memcpy(elements, &word, sizeof(word));
    if constexpr (kElements == 1) values[0] = Element<T>::load(elements[0]);
#pragma unroll
    for (int i = 0; i + 1 < kElements; i += 2) {
      Element<T>::load_pair(elements + i, values[i], values[i + 1]);
    }
  }
  static __device__ Pack pack(const Acc (&values)[kElements]) {
    T elements[kElements];
    if constexpr (kElements == 1) elements[0] = Element<T>::store(values[0]);
#pragma unroll
    for (int i = 0; i + 1 < kElements; i += 2) {
      Element<T>::store_pair(elements + i, values[i], values[i + 1]);
    }
    Pack result;
    memcpy(&result.word, elements, sizeof(result.word));
    return result;
  }
};

// One pack of a merged row, for both kernels. `scale` is null where the output is not scaled.
template <class In, class Out, int kElements>
__device__ Pack<Out, kElements> merge_pack(Weights<typename Accumulate<In>::type> weights,
                                           const float* scale, Pack<In, kElements> prefix,
                                           Pack<In, kElements> suffix) {
  if (weights.skips_prefix() && weights.skips_suffix()) return {};
  const bool blends = !weights.skips_prefix() && !weights.skips_suffix();
  const Pack<In, kElements> taken = weights.skips_prefix() ? suffix : prefix;
  if constexpr (std::is_same_v<In, Out>) {
    if (!blends && scale == nullptr) return taken;  // byte for byte
  }
  typename Accumulate<In>::type values[kElements];
  taken.unpack(values);
  if (blends) {
    typename Accumulate<In>::type others[kElements];
    suffix.unpack(others);
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = blend(weights, values[i], others[i]);
  }
  if constexpr (kIsFp8<Out>) {
    if (scale != nullptr) {
#pragma unroll
      for (int i = 0; i < kElements; ++i) values[i] = values[i] / *scale;
    }
  }
  return Pack<Out, kElements>::pack(values);
}

}  // namespace merge_attn_states::cuda
