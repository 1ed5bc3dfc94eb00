// The formula's functions for eight rows at a time; the C library's cost half of what a row takes
// to stream. Included once by each build, after pack.h. Only additions,
// multiplications and integer arithmetic, so both builds give the same bits.

template <class Acc>
struct VectorMath {  // double: for gradient checks, not for speed
  using Scalar = Acc;
  using V = Vector<Acc>;

  template <class F>
  static V each(V x, F&& f) {
    for (int k = 0; k < kLanes; ++k) x[k] = f(x[k]);
    return x;
  }
  static V abs(V x) { return x < Acc(0) ? -x : x; }
  static V max(V a, V b) { return b > a ? b : a; }
  static V reciprocal(V x) { return Acc(1) / x; }
  static V exp(V x) {
    return each(x, [](Acc value) { return std::exp(value); });
  }
  static V log(V x) {
    return each(x, [](Acc value) { return std::log(value); });
  }
  static V log_sum_exp(V larger, V, V e, V) {
    return larger + each(e, [](Acc value) { return std::log1p(value); });
  }
};

template <>
struct VectorMath<float> {
  using Scalar = float;

  static Floats abs(Floats x) { return bits_as<Floats>(bits_as<Words>(x) & 0x7fffffffu); }
  static Floats max(Floats a, Floats b) { return b > a ? b : a; }

  static Floats reciprocal(Floats x) { return 1.0f / x; }

  // exp(x) for x <= 0, within 2 ulp. Below the normal numbers it is the smallest of these as long
  // as float32 has a number there, so that it times infinity is infinity and no mode flushes it. x
  // = n ln 2 + r, |r| <= ln 2 / 2, and the Taylor series of exp(r) to r^7 (5e-9).
  static Floats exp(Floats x) {
    constexpr float kLog2E = 1.44269504f, kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr float kSmallest = -87.33f;   // about ln 2^-126
    constexpr float kNothing = -103.972f;  // about ln 2^-150, which rounds to 0
    constexpr float kRound = 12582912.0f;  // 1.5 * 2^23: adding it rounds to an integer
    constexpr uint32_t kRoundBits = 0x4b400000u;
    const Floats safe = x < kSmallest ? Floats{} + kSmallest : x;
    const Floats rounded = safe * kLog2E + kRound;
    const Floats n = rounded - kRound;
    const Floats r = (safe - n * kLn2High) - n * kLn2Low;
    Floats series = r * (1.0f / 5040.0f) + 1.0f / 720.0f;
    series = series * r + 1.0f / 120.0f;
    series = series * r + 1.0f / 24.0f;
    series = series * r + 1.0f / 6.0f;
    series = series * r + 0.5f;
    series = series * r * r + r + 1.0f;
    const Words power = (bits_as<Words>(rounded) - kRoundBits) << 23;
    const Floats scaled = bits_as<Floats>(bits_as<Words>(series) + power);
    return x < kNothing ? Floats{} : (x == x ? scaled : x);
  }

  // log(x) for normal x, within 2 ulp: x = 2^n m with m in [0.7, 1.42), and 2 atanh(s) with
  // s = (m - 1) / (m + 1) <= 0.18, whose series to s^11 leaves 1e-10.
  static Floats log(Floats x) {
    constexpr float kLn2High = 0.693359375f, kLn2Low = -2.12194440e-4f;
    constexpr uint32_t kSmallestM = 0x3f333333u;  // 0.7
    constexpr uint32_t kExponent = 0xff800000u;
    const Words above = bits_as<Words>(x) - kSmallestM;
    const Floats m = bits_as<Floats>((above & ~kExponent) + kSmallestM);
    const Floats n = __builtin_convertvector(bits_as<Vector<int32_t>>(above) >> 23, Floats);
    const Floats s = (m - 1.0f) / (m + 1.0f), square = s * s;
    Floats series = square * (1.0f / 11.0f) + 1.0f / 9.0f;
    series = series * square + 1.0f / 7.0f;
    series = series * square + 0.2f;
    series = series * square + 1.0f / 3.0f;
    const Floats twice = s + s;
    const Floats of_m = series * square * twice + twice;
    return x == x ? n * kLn2High + (n * kLn2Low + of_m) : x;
  }

  // larger + log(1 + e) for e in [0, 1], the logarithm within 3 ulp: 2 atanh(s) with
  // s = e / (2 + e) <= 1/3, whose series to s^15 leaves 1e-9.
  static Floats log_sum_exp(Floats larger, Floats, Floats e, Floats) {
    const Floats s = e / (2.0f + e), square = s * s;
    Floats series = square * (1.0f / 15.0f) + 1.0f / 13.0f;
    series = series * square + 1.0f / 11.0f;
    series = series * square + 1.0f / 9.0f;
    series = series * square + 1.0f / 7.0f;
    series = series * square + 0.2f;
    series = series * square + 1.0f / 3.0f;
    const Floats twice = s + s;
    return larger + (series * square * twice + twice);
  }
};
