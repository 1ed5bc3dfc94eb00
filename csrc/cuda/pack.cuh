// Pack<T>: sixteen bytes of T to floats and back, and single elements for the generic kernel. All
// conversions round to nearest even; FP8 saturates to its largest finite value and keeps NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../dtypes.h"

namespace merge_attn_states::cuda {

// One element of T as what a row is computed in, and two at a time where the hardware converts two.
template <class T>
struct Element;

template <class T>
struct PlainElement {
  static __device__ T load(T value) { return value; }
  static __device__ T store(T value) { return value; }
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

// Elements of T in the vectorized kernel's 16 bytes of input; its output pack has as many.
template <class T>
inline constexpr int kPackElements = 16 / sizeof(T);

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

template <class T, int kElements>
struct Pack {
  using Word = typename WordOf<sizeof(T) * kElements>::type;
  Word word;

  // Plain loads and stores: an operand may be written by the very kernel that reads it.
  static __device__ Pack load(const T* from) { return {*reinterpret_cast<const Word*>(from)}; }
  __device__ void store(T* to) const { *reinterpret_cast<Word*>(to) = word; }

  __device__ void unpack(float (&values)[kElements]) const {
    T elements[kElements];
    memcpy(elements, &word, sizeof(word));
#pragma unroll
    for (int i = 0; i < kElements; ++i) values[i] = Element<T>::load(elements[i]);
  }
  static __device__ Pack pack(const float (&values)[kElements]) {
    T elements[kElements];
#pragma unroll
    for (int i = 0; i < kElements; i += 2) {
      Element<T>::store_pair(elements + i, values[i], values[i + 1]);
    }
    Pack result;
    memcpy(&result.word, elements, sizeof(result.word));
    return result;
  }
};

}  // namespace merge_attn_states::cuda
