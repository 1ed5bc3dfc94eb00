// Pack<T, n>: n elements side by side, to floats and back: 16 bytes of the inputs in pair.cu, eight
// bytes or one element in generic.cu; Raw<n> where the dtype is known only at run time. All
// conversions round to nearest even; FP8 saturates to its largest finite value and keeps NaN.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>
#include <cuda_fp8.h>

#include "../core/dtypes.h"
#include "../core/state.h"

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
  // By the word: taken apart into halves first, the second costs two instructions more.
  static __device__ void load_pair(const BFloat16* from, float& first, float& second) {
    uint32_t word;
    memcpy(&word, from, sizeof(word));
    first = __uint_as_float(word << 16);
    second = __uint_as_float(word & 0xffff0000u);
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
    __nv_fp8x2_storage_t codes;
    memcpy(&codes, from, sizeof(codes));
    const float2 pair = __half22float2(__half2(__nv_cvt_fp8x2_to_halfraw2(codes, kFormat)));
    first = pair.x;
    second = pair.y;
  }
  static __device__ void store_pair(T* to, float first, float second) {
    const __nv_fp8x2_storage_t pair =
        __nv_cvt_float2_to_fp8x2({first, second}, __NV_SATFINITE, kFormat);
    memcpy(to, &pair, sizeof(pair));  // taken apart, the bytes cost four instructions a pair
  }
};
template <>
struct Element<Float8E4M3> : Float8Element<Float8E4M3, __NV_E4M3> {};
template <>
struct Element<Float8E5M2> : Float8Element<Float8E5M2, __NV_E5M2> {};

// Global memory, said outright: the compiler would split the store of a vector into words, and
// cannot tell where an address that comes from shared memory points to.
__device__ inline void store_global(uint4* to, uint4 w) {
  asm volatile("st.global.v4.b32 [%0], {%1, %2, %3, %4};" ::"l"(to), "r"(w.x), "r"(w.y), "r"(w.z),
               "r"(w.w)
               : "memory");
}
__device__ inline void store_global(uint2* to, uint2 w) {
  asm volatile("st.global.v2.b32 [%0], {%1, %2};" ::"l"(to), "r"(w.x), "r"(w.y) : "memory");
}
__device__ inline void store_global(float* to, float w) {
  asm volatile("st.global.f32 [%0], %1;" ::"l"(to), "f"(w) : "memory");
}
// Eight float32: two words.
struct TwoWords {
  uint4 first;
  uint4 second;
};
__device__ inline void store_global(TwoWords* to, TwoWords w) {
  store_global(&to->first, w.first);
  store_global(&to->second, w.second);
}
template <class Word>
__device__ void store_global(Word* to, Word w) {
  *to = w;
}

__device__ inline uint4 load_global(const uint4* from) {
  uint4 w;
  asm volatile("ld.global.v4.b32 {%0, %1, %2, %3}, [%4];"
               : "=r"(w.x), "=r"(w.y), "=r"(w.z), "=r"(w.w)
               : "l"(from)
               : "memory");
  return w;
}
__device__ inline uint2 load_global(const uint2* from) {
  uint2 w;
  asm volatile("ld.global.v2.b32 {%0, %1}, [%2];" : "=r"(w.x), "=r"(w.y) : "l"(from) : "memory");
  return w;
}
__device__ inline float load_global(const float* from) {
  float w;
  asm volatile("ld.global.f32 %0, [%1];" : "=f"(w) : "l"(from) : "memory");
  return w;
}
__device__ inline TwoWords load_global(const TwoWords* from) {
  return {load_global(&from->first), load_global(&from->second)};
}
__device__ inline int32_t load_global(const int32_t* from) {
  int32_t w;
  asm volatile("ld.global.s32 %0, [%1];" : "=r"(w) : "l"(from) : "memory");
  return w;
}
__device__ inline int64_t load_global(const int64_t* from) {
  int64_t w;
  asm volatile("ld.global.s64 %0, [%1];" : "=l"(w) : "l"(from) : "memory");
  return w;
}
template <class Word>
__device__ Word load_global(const Word* from) {
  return *from;
}

template <int kBytes>
struct WordOf;
template <>
struct WordOf<32> {
  using type = TwoWords;
};
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
  static __device__ Pack load(const T* from) {
    return {load_global(reinterpret_cast<const Word*>(from))};
  }
  __device__ void store(T* to) const { store_global(reinterpret_cast<Word*>(to), word); }

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

// An FP8 output's scale. A quotient is rounded as an IEEE division rounds, which costs the GPU some
// ten instructions an element: a product with the reciprocal is put right by one residual instead
// (Markstein), exactly as long as nothing over- or underflows. Beyond kExact a quotient saturates
// whatever its last bit says; inf and NaN have no residual. Of a positive scale the residual taken
// as an excess leaves -0 its sign; other scales, which no model has, go the long way.
class Scale {
 public:
  Scale() = default;  // none is given
  explicit __device__ Scale(float scale)
      : given_(true), moderate_(scale >= 1 / kModerate && scale <= kModerate), scale_(scale) {
    const float near = ScalarMath<float>::reciprocal(scale);
    reciprocal_ = __fmaf_rn(__fmaf_rn(-near, scale, 1.0f), near, near);
  }

  __device__ bool given() const { return given_; }

  template <int kElements>
  __device__ void divide(float (&values)[kElements]) const {
    if (moderate_) {
#pragma unroll
      for (float& value : values) {
        const float quotient = value * reciprocal_;
        const float excess = __fmaf_rn(quotient, scale_, -value);
        value = fabsf(quotient) < kExact ? __fmaf_rn(excess, -reciprocal_, quotient) : quotient;
      }
    } else {
      // Too precise to round to a wrong float.
      const double reciprocal = 1.0 / double{scale_};
#pragma unroll
      for (float& value : values) value = static_cast<float>(value * reciprocal);
    }
  }

 private:
  static constexpr float kExact = 0x1p20f;     // the largest FP8 number is 57344
  static constexpr float kModerate = 0x1p60f;  // keeps each residual that matters a normal number

  bool given_ = false;
  bool moderate_ = false;
  float scale_ = 1.0f;
  float reciprocal_ = 1.0f;
};

// One pack of a merged row, for every kernel.
template <class In, class Out, int kElements>
__device__ Pack<Out, kElements> merge_pack(Weights<typename Accumulate<In>::type> weights,
                                           const Scale& scale, Pack<In, kElements> prefix,
                                           Pack<In, kElements> suffix) {
  const bool blends = !weights.skips_prefix() && !weights.skips_suffix();
  Pack<In, kElements> taken = prefix;
  if (!blends) {
    if (weights.skips_prefix()) taken = weights.skips_suffix() ? Pack<In, kElements>{} : suffix;
    if constexpr (std::is_same_v<In, Out>) {
      if (!scale.given()) return taken;  // byte for byte
    }
    if (weights.skips_prefix() && weights.skips_suffix()) return {};  // 0, whatever the scale
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
    if (!kIsFp8<In> || scale.given()) scale.divide(values);
  }
  return Pack<Out, kElements>::pack(values);
}

// Elements of one part, as they are stored: 1, 2, 4 or 8 bytes each.
template <int kElements>
struct Raw {
  uint4 words[kElements == 8 ? 2 : 1];

  static __device__ Raw load(const char* from, int64_t element_bytes) {
    Raw raw{};
    with_word(element_bytes, [&]<class Word>(Word) {
      const Word word = load_global(reinterpret_cast<const Word*>(from));
      memcpy(&raw, &word, sizeof(word));
    });
    return raw;
  }
  __device__ void store(char* to, int64_t element_bytes) const {
    with_word(element_bytes, [&]<class Word>(Word word) {
      memcpy(&word, this, sizeof(word));
      store_global(reinterpret_cast<Word*>(to), word);
    });
  }

 private:
  // Calls f with a word of as many bytes as the elements have.
  template <class F>
  static __device__ void with_word(int64_t element_bytes, F&& f) {
    switch (kElements * element_bytes) {
      case 1:
        return f(uint8_t{});
      case 2:
        return f(uint16_t{});
      case 4:
        return f(uint32_t{});
      case 8:
        return f(uint2{});
      case 32:
        if constexpr (kElements == 8) return f(TwoWords{});
        [[fallthrough]];
      default:
        return f(uint4{});
    }
  }
};

// f(TypeTag<T>) for the dtype of a part or of the result.
template <class Acc, class F>
__device__ void with_dtype(DType dtype, F&& f) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    f(TypeTag<double>{});
  } else {
    switch (dtype) {
      case DType::kFloat16:
        return f(TypeTag<Half>{});
      case DType::kBFloat16:
        return f(TypeTag<BFloat16>{});
      case DType::kFloat8E4M3:
        return f(TypeTag<Float8E4M3>{});
      case DType::kFloat8E5M2:
        return f(TypeTag<Float8E5M2>{});
      default:
        return f(TypeTag<float>{});
    }
  }
}

template <class Acc>
__device__ Acc load_element(const void* data, DType dtype, int64_t offset) {
  Acc value;
  with_dtype<Acc>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    value = Element<T>::load(static_cast<const T*>(data)[offset]);
  });
  return value;
}

template <class Acc, int kElements>
__device__ void unpack(const Raw<kElements>& raw, DType dtype, Acc (&values)[kElements]) {
  with_dtype<Acc>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Pack<T, kElements> pack;
    memcpy(&pack.word, &raw, sizeof(pack.word));
    pack.unpack(values);
  });
}

template <class Acc, int kElements>
__device__ Raw<kElements> pack(const Acc (&values)[kElements], DType dtype) {
  Raw<kElements> raw{};
  with_dtype<Acc>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto packed = Pack<T, kElements>::pack(values);
    memcpy(&raw, &packed.word, sizeof(packed.word));
  });
  return raw;
}

}  // namespace merge_attn_states::cuda
