// Eight elements of any supported dtype to float and back. Included once by each build of the CPU
// kernels, inside its namespace: no header guard, and nothing here may be shared between builds.
//
// The vector types are GCC's; the compiler maps them to what the build may use. Both builds give
// the same bits: conversions are exact or round to nearest even by integer arithmetic, so they do
// not depend on a flush-to-zero mode either. float16 alone has its own instructions (F16C):
// by integers it is slower than the memory.

inline constexpr int kLanes = 8;

template <class T>
struct VectorOf {
  typedef T type __attribute__((vector_size(kLanes * sizeof(T))));
};
template <class T>
using Vector = typename VectorOf<T>::type;
using Floats = Vector<float>;
using Words = Vector<uint32_t>;

inline Words choose(Words mask, Words yes, Words no) { return mask ? yes : no; }

template <class To, class From>
To bits_as(const From& from) {
  static_assert(sizeof(To) == sizeof(From));
  To to;
  __builtin_memcpy(&to, &from, sizeof(to));
  return to;
}

// A binary format of at most 16 bits in 32-bit lanes. `kFinite` formats spend the highest exponent
// on numbers and only its highest code on NaN; the others keep it for infinities and NaN.
template <int kMantissa, int kBias, bool kFinite, uint32_t kLargest, int kBits>
struct SmallFloat {
  static constexpr int kShift = 23 - kMantissa;
  static constexpr uint32_t kMagnitude = (1u << (kBits - 1)) - 1;
  static constexpr uint32_t kNaN = kMagnitude;
  static constexpr uint32_t kInfinity = ((1u << (kBits - 1 - kMantissa)) - 1) << kMantissa;
  static constexpr uint32_t kRebias = static_cast<uint32_t>(127 - kBias) << 23;

  static Floats decode(Words code) {
    const Words magnitude = code & kMagnitude;
    const Words sign = (code & ~kMagnitude) << (32 - kBits);
    // Subnormals count units of 2^(1 - bias - mantissa).
    const Floats unit = Floats{} + bits_as<float>(uint32_t(127 + 1 - kBias - kMantissa) << 23);
    const Words subnormal = bits_as<Words>(__builtin_convertvector(magnitude, Floats) * unit);
    Words value = (magnitude << kShift) + kRebias;
    value = choose(Words(magnitude < (1u << kMantissa)), subnormal, value);
    if constexpr (kFinite) {
      value = choose(Words(magnitude == kNaN), Words{} + 0x7fc00000u, value);
    } else {
      const Words quiet = Words(magnitude > kInfinity) & 0x00400000u;
      value =
          choose(Words(magnitude >= kInfinity), (magnitude << kShift) | 0x7f800000u | quiet, value);
    }
    return bits_as<Floats>(value | sign);
  }

  // Round to nearest even; past kLargest to kLargest where kSaturate, else to infinity.
  template <bool kSaturate>
  static Words encode(Floats value) {
    const Words bits = bits_as<Words>(value);
    const Words sign = (bits & 0x80000000u) >> (32 - kBits);
    const Words all = bits & 0x7fffffffu;
    const Words nan = Words(value != value);
    Words magnitude = all;
    if constexpr (kSaturate) {
      const uint32_t largest = ((kLargest >> kMantissa) + 127 - kBias) << 23 |
                               (kLargest & ((1u << kMantissa) - 1)) << kShift;
      magnitude = choose(Words(all > largest), Words{} + largest, all);
    }
    const Words odd = (magnitude >> kShift) & 1u;
    Words code = ((magnitude + ((1u << (kShift - 1)) - 1) + odd) >> kShift) - (kRebias >> kShift);
    // Adding a number whose ulp is the subnormal unit lets the addition do the rounding.
    const uint32_t anchor = uint32_t(127 + 1 - kBias - kMantissa + 23) << 23;
    const Words small = bits_as<Words>(bits_as<Floats>(magnitude) + bits_as<float>(anchor));
    code = choose(Words(magnitude < (uint32_t(128 - kBias) << 23)), small - anchor, code);
    if constexpr (!kSaturate) {
      // From 2^(bias + 1) on, also where rounding alone would pass the infinity's code.
      code = choose(Words(magnitude >= (uint32_t(128 + kBias) << 23)), Words{} + kInfinity, code);
    }
    const uint32_t quiet_nan = kFinite ? kNaN : kInfinity | (1u << (kMantissa - 1));
    const Words payload = kFinite ? Words{} : (all >> kShift) & ((1u << kMantissa) - 1);
    return choose(nan, payload | quiet_nan, code) | sign;
  }
};

using HalfFormat = SmallFloat<10, 15, false, 0x7bff, 16>;
using E4M3Format = SmallFloat<3, 7, true, 0x7e, 8>;
using E5M2Format = SmallFloat<2, 15, false, 0x7b, 8>;

// Eight codes of 8 or 16 bits to words and back. GCC 12 takes the generic conversion apart element
// by element for 16 bits: 0.35 of torch.add's bandwidth.
template <class Code>
Words load_codes(const void* from) {
#ifdef MERGE_ATTN_STATES_V3
  if constexpr (sizeof(Code) == 2) {
    return bits_as<Words>(
        _mm256_cvtepu16_epi32(_mm_loadu_si128(static_cast<const __m128i*>(from))));
  }
#endif
  Vector<Code> codes;
  __builtin_memcpy(&codes, from, sizeof(codes));
  return __builtin_convertvector(codes, Words);
}

template <class Code>
void store_codes(void* to, Words words) {
#ifdef MERGE_ATTN_STATES_V3
  if constexpr (sizeof(Code) == 2) {
    const __m256i wide = bits_as<__m256i>(words);
    return _mm_storeu_si128(
        static_cast<__m128i*>(to),
        _mm_packus_epi32(_mm256_castsi256_si128(wide), _mm256_extracti128_si256(wide, 1)));
  }
#endif
  const Vector<Code> codes = __builtin_convertvector(words, Vector<Code>);
  __builtin_memcpy(to, &codes, sizeof(codes));
}

// Pack<T>: eight elements at an address of T. Where kStreams<T>, stream() is a store past the
// caches, to an address that is aligned to the pack, and finish_streams() orders such stores before
// all that follows.
#ifdef MERGE_ATTN_STATES_V3
template <class T>
inline constexpr bool kStreams =
    std::is_same_v<T, float> || std::is_same_v<T, BFloat16> || std::is_same_v<T, Half>;

inline void finish_streams() { _mm_sfence(); }
#else
template <class T>
inline constexpr bool kStreams = false;

inline void finish_streams() {}
#endif

template <class T>
struct Pack {  // float, double
  using Values = Vector<T>;
  static Values load(const T* from) {
    Values values;
    __builtin_memcpy(&values, from, sizeof(values));
    return values;
  }
  static void store(T* to, Values values) { __builtin_memcpy(to, &values, sizeof(values)); }
#ifdef MERGE_ATTN_STATES_V3
  static void stream(T* to, Values values) { _mm256_stream_ps(to, bits_as<__m256>(values)); }
#endif
};

template <>
struct Pack<BFloat16> {
  using Values = Floats;
  static Floats load(const BFloat16* from) {
    return bits_as<Floats>(load_codes<uint16_t>(from) << 16);
  }
  static void store(BFloat16* to, Floats values) {
    const Words bits = bits_as<Words>(values);
    const Words rounded = (bits + 0x7fffu + ((bits >> 16) & 1u)) >> 16;
    const Words nan = Words(values != values);
    store_codes<uint16_t>(to, choose(nan, (bits >> 16) | 0x40u, rounded));
  }
#ifdef MERGE_ATTN_STATES_V3
  static void stream(BFloat16* to, Floats values) {
    BFloat16 codes[kLanes];
    store(codes, values);
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), bits_as<__m128i>(codes));
  }
#endif
};

template <>
struct Pack<Half> {
  using Values = Floats;
#ifdef MERGE_ATTN_STATES_V3
  static Floats load(const Half* from) {
    return bits_as<Floats>(
        _mm256_cvtph_ps(_mm_loadu_si128(reinterpret_cast<const __m128i*>(from))));
  }
  static __m128i encode(Floats values) {
    return _mm256_cvtps_ph(bits_as<__m256>(values), _MM_FROUND_TO_NEAREST_INT);
  }
  static void store(Half* to, Floats values) {
    _mm_storeu_si128(reinterpret_cast<__m128i*>(to), encode(values));
  }
  static void stream(Half* to, Floats values) {
    _mm_stream_si128(reinterpret_cast<__m128i*>(to), encode(values));
  }
#else
  static Floats load(const Half* from) { return HalfFormat::decode(load_codes<uint16_t>(from)); }
  static void store(Half* to, Floats values) {
    store_codes<uint16_t>(to, HalfFormat::encode<false>(values));
  }
#endif
};

template <class T, class Format>
struct Float8Pack {
  using Values = Floats;
  static Floats load(const T* from) { return Format::decode(load_codes<uint8_t>(from)); }
  static void store(T* to, Floats values) {
    store_codes<uint8_t>(to, Format::template encode<true>(values));
  }
};
template <>
struct Pack<Float8E4M3> : Float8Pack<Float8E4M3, E4M3Format> {};
template <>
struct Pack<Float8E5M2> : Float8Pack<Float8E5M2, E5M2Format> {};

// Sixteen BFloat16 as two vectors of floats, those at even places and those at odd ones: what they
// share is a 32-bit word, so that taking them apart and putting them together again needs neither
// widening nor packing.
#ifdef MERGE_ATTN_STATES_V3
struct BFloat16Pairs {
  static constexpr int kElements = 2 * kLanes;
  static constexpr uint32_t kOdd = 0xffff0000u;
  Floats even, odd;

  static BFloat16Pairs load(const BFloat16* from) {
    Words words;
    __builtin_memcpy(&words, from, sizeof(words));
    return {bits_as<Floats>(words << 16), bits_as<Floats>(words & kOdd)};
  }
  template <bool kStreamed>
  void store(BFloat16* to) const {
    const bool has_nan = _mm256_movemask_ps(
        _mm256_cmp_ps(bits_as<__m256>(even), bits_as<__m256>(odd), _CMP_UNORD_Q));
    if (__builtin_expect(has_nan, false)) return store_each(to);
    const __m256i words = _mm256_blend_epi16(bits_as<__m256i>(rounded(even) >> 16),
                                             bits_as<__m256i>(rounded(odd)), 0xaa);
    if constexpr (kStreamed) return _mm256_stream_si256(reinterpret_cast<__m256i*>(to), words);
    _mm256_storeu_si256(reinterpret_cast<__m256i*>(to), words);
  }

 private:
  // Right in the upper half, unless a NaN.
  static Words rounded(Floats values) {
    const Words bits = bits_as<Words>(values);
    return bits + 0x7fffu + ((bits >> 16) & 1u);
  }
  void store_each(BFloat16* to) const {
    BFloat16 codes[2][kLanes];
    Pack<BFloat16>::store(codes[0], even);
    Pack<BFloat16>::store(codes[1], odd);
    for (int i = 0; i < kElements; ++i) to[i] = codes[i % 2][i / 2];
  }
};

inline BFloat16Pairs operator*(float factor, BFloat16Pairs values) {
  return {factor * values.even, factor * values.odd};
}
inline BFloat16Pairs operator+(BFloat16Pairs left, BFloat16Pairs right) {
  return {left.even + right.even, left.odd + right.odd};
}
#endif
