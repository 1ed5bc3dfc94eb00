// The only formula, for host and device: section 2.2 of arXiv 2501.01005, for two parts and for any
// number of them.
//
//     m = max(lse_p, lse_s)      w_i = exp(lse_i - m) / sum_j exp(lse_j - m)
//     O = w_p O_p + w_s O_s      lse = m + log(sum_j exp(lse_j - m))
//
// With e = exp(-|lse_p - lse_s|) the larger part weighs 1 / (1 + e), the smaller e / (1 + e), and
// lse = m + log1p(e): one exponential, no overflow, and an exact sum of weights within an ulp. A
// GPU computes that logarithm from the LSEs themselves (log_sum_exp.h). Of many parts each has its
// exponential; of two, the weights are the pair's bit for bit.
//
// The empty rule. A part whose lse is -inf or +inf saw no keys:
//
//     prefix \ suffix |  finite          empty             NaN
//     finite          |  blend           take prefix       NaN
//     empty           |  take suffix     zeros, lse -inf   NaN
//     NaN             |  NaN             NaN               NaN
//
// Every build turns contraction off (-ffp-contract=off, -fmad=false), so that this one source gives
// the same bits in every kernel.
#pragma once

#include <cmath>
#include <limits>
#include <type_traits>

#include "log_sum_exp.h"
#include "lse_base.h"

namespace merge_attn_states {

// The weight of an empty part: its values are never used, not even times zero, since 0 * NaN is
// NaN. A real weight is never negative; one that underflows to 0 still multiplies.
inline constexpr float kSkip = -1.0f;

// V is float, double or a vector of them.
template <class V>
struct Weights {
  V prefix;
  V suffix;

  MERGE_ATTN_STATES_HOST_DEVICE bool skips_prefix() const { return prefix < V(0); }
  MERGE_ATTN_STATES_HOST_DEVICE bool skips_suffix() const { return suffix < V(0); }
};

template <class Acc>
struct ScalarMath {
  using Scalar = Acc;
  static MERGE_ATTN_STATES_HOST_DEVICE Acc abs(Acc x) { return std::fabs(x); }
  // `a` where b is NaN.
  static MERGE_ATTN_STATES_HOST_DEVICE Acc max(Acc a, Acc b) {
#ifdef __CUDA_ARCH__
    return fmax(a, b);
#else
    return b > a ? b : a;
#endif
  }
  static MERGE_ATTN_STATES_HOST_DEVICE Acc exp(Acc x) { return std::exp(x); }
  static MERGE_ATTN_STATES_HOST_DEVICE Acc log(Acc x) { return std::log(x); }
  // log(exp(larger) + exp(smaller)); e is exp(smaller - larger), and weight 1 / (1 + e).
  static MERGE_ATTN_STATES_HOST_DEVICE Acc log_sum_exp(Acc larger, [[maybe_unused]] Acc smaller,
                                                       Acc e, [[maybe_unused]] Acc weight) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Acc) == sizeof(float)) {
      return precise_log_sum_exp(larger, smaller, e, weight);
    }
#endif
    return larger + std::log1p(e);
  }
  // A GPU's IEEE division has a slow path that costs registers; its approximation is within an ulp.
  static MERGE_ATTN_STATES_HOST_DEVICE Acc reciprocal(Acc x) {
#ifdef __CUDA_ARCH__
    if constexpr (sizeof(Acc) == sizeof(float)) {
      float result;
      asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
      return result;
    }
#endif
    return Acc(1) / x;
  }
};

template <class Math, class V>
struct MergedLse {
  Weights<V> weights;
  V base;       // the larger lse; or, where e is 0, the merged one itself
  V following;  // the smaller one, where e is not 0
  V e;

  // Apart from the weights, since its logarithm can wait until these are used.
  MERGE_ATTN_STATES_HOST_DEVICE V lse() const {
    const V weight = weights.prefix > weights.suffix ? weights.prefix : weights.suffix;
    const V sum = Math::log_sum_exp(base, following, e, weight);
    return e == typename Math::Scalar(0) ? base : sum;
  }
};

// Written without branches, so that Math may also be eight rows at a time (cpu/vector_math.h).
template <class Math, class V>
MERGE_ATTN_STATES_HOST_DEVICE MergedLse<Math, V> merge_lse(V prefix_lse, V suffix_lse) {
  using Acc = typename Math::Scalar;
  constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  const V one = V{} + Acc(1), skip = V{} + Acc(kSkip), none = V{} - kInf;
  const auto prefix_empty = Math::abs(prefix_lse) == kInf;
  const auto suffix_empty = Math::abs(suffix_lse) == kInf;
  const auto numbers = (prefix_lse == prefix_lse) & (suffix_lse == suffix_lse);
  const auto any_empty = (prefix_empty | suffix_empty) & numbers;

  const V difference = prefix_lse - suffix_lse;
  const V e = Math::exp(-Math::abs(difference));  // in [0, 1]
  const V larger = Math::reciprocal(Acc(1) + e);
  const V smaller = e * larger;
  const auto prefix_leads = difference >= Acc(0);
  const V leading = prefix_leads ? prefix_lse : suffix_lse;
  const V following = prefix_leads ? suffix_lse : prefix_lse;
  const V taken = prefix_empty ? (suffix_empty ? none : suffix_lse) : prefix_lse;

  const V prefix = prefix_leads ? larger : smaller, suffix = prefix_leads ? smaller : larger;
  return {{any_empty ? (prefix_empty ? skip : one) : prefix,
           any_empty ? (suffix_empty ? skip : one) : suffix},
          any_empty ? taken : leading,
          following,
          any_empty ? V{} : e};
}

// A token past the context count: the suffix as it is, its lse raw.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE MergedLse<ScalarMath<Acc>, Acc> take_suffix(Acc suffix_lse) {
  return {{Acc(kSkip), Acc(1)}, suffix_lse, suffix_lse, Acc(0)};
}

// V is Acc or a vector of values in one row.
template <class V, class Acc>
MERGE_ATTN_STATES_HOST_DEVICE V add_product(V sum, Acc weight, V value) {
#ifdef __CUDA_ARCH__
  return fma(weight, value, sum);
#else
  return sum + weight * value;
#endif
}

template <class V, class Acc>
MERGE_ATTN_STATES_HOST_DEVICE V blend(Weights<Acc> weights, V prefix, V suffix) {
  return add_product(weights.prefix * prefix, weights.suffix, suffix);
}

// A sum over the parts in their order, as sums of sixteen and the sum of these: it is rounded as
// often as K / 16 + 16 says and not K times. Whoever adds calls end_sixteen() in front of each
// part whose number is a multiple of kAtOnce. -0 is what changes no sum, not even -0.
template <class V>
class SumOfParts {
 public:
  static constexpr int kAtOnce = 16;

  MERGE_ATTN_STATES_HOST_DEVICE void end_sixteen() {
    add_sixteen(sixteen_);
    sixteen_ = -V{};
  }
  // What another thread has summed.
  MERGE_ATTN_STATES_HOST_DEVICE void add_sixteen(V sum) { total_ = total_ + sum; }
  MERGE_ATTN_STATES_HOST_DEVICE void add(V term) { sixteen_ = sixteen_ + term; }
  template <class Acc>
  MERGE_ATTN_STATES_HOST_DEVICE void add(Acc weight, V value) {
    sixteen_ = add_product(sixteen_, weight, value);
  }
  MERGE_ATTN_STATES_HOST_DEVICE V value() const { return total_ + sixteen_; }

 private:
  V total_ = -V{};
  V sixteen_ = -V{};
};

// How LSEs are compared: in their base, or natural and in two terms (PartLse) where bases differ.
template <class V>
MERGE_ATTN_STATES_HOST_DEVICE V distance(V a, V b) {
  return a - b;
}
template <class V>
MERGE_ATTN_STATES_HOST_DEVICE V distance(PartLse<V> a, PartLse<V> b) {
  return (a.high - b.high) + (a.low - b.low);
}

// Any number of parts, and a sink, which is one without values. `find` sees every LSE, then `add`,
// in the parts' order and the sink last; then the weights are known. Several threads that share a
// row find the largest of some LSEs each, and add to sums of sixteen each. Lse is V or PartLse<V>.
// Where the caller knows that no part is empty, nothing is asked of each.
template <class Math, class V, class Lse = V, bool kMayBeEmpty = true>
class ManyLses {
  using Acc = typename Math::Scalar;

 public:
  explicit MERGE_ATTN_STATES_HOST_DEVICE ManyLses(Base base) : ln_base_(ln_of<Acc>(base)) {}

  // A NaN is never the largest; it reaches the result through the sum.
  MERGE_ATTN_STATES_HOST_DEVICE void find(Lse part) {
    if constexpr (!kMayBeEmpty) {
      largest_ = Math::max(largest_, part);
    } else if constexpr (kIsPlain) {
      largest_ = Math::max(largest_, Math::abs(part) == kInf ? V{} - kInf : part);
    } else {
      const auto leads = (distance(part, largest_) > Acc(0)) & (Math::abs(part.high) != kInf);
      largest_.high = leads ? part.high : largest_.high;
      largest_.low = leads ? part.low : largest_.low;
    }
  }
  MERGE_ATTN_STATES_HOST_DEVICE Lse largest() const { return largest_; }

  // What the part adds to the sum, or kSkip: what `weight` wants.
  MERGE_ATTN_STATES_HOST_DEVICE V term(Lse part) const {
    const V e = Math::exp(distance(part, largest_) * ln_base_);
    if constexpr (!kMayBeEmpty) return e;
    return Math::abs(high(part)) == kInf ? V{} + Acc(kSkip) : e;
  }
  static MERGE_ATTN_STATES_HOST_DEVICE V summand(V term) {
    if constexpr (!kMayBeEmpty) return term;
    return term < Acc(0) ? V{} : term;
  }

  MERGE_ATTN_STATES_HOST_DEVICE V add(Lse part) {
    if (count_++ % SumOfParts<V>::kAtOnce == 0) sum_.end_sixteen();
    const V e = term(part);
    sum_.add(summand(e));
    return e;
  }
  MERGE_ATTN_STATES_HOST_DEVICE V sum() const { return sum_.value(); }

  // Of an empty part too it is NaN where an LSE, or the sink, is. `reciprocal` is 1 / sum.
  static MERGE_ATTN_STATES_HOST_DEVICE V weight(V term, V sum, V reciprocal) {
    if constexpr (!kMayBeEmpty) return term * reciprocal;
    const auto is_skipped = (term < Acc(0)) & (sum == sum);
    return is_skipped ? term : term * reciprocal;
  }

  // In the base of the parts; -inf where all are empty. A lone part's is what it was.
  MERGE_ATTN_STATES_HOST_DEVICE V lse(V sum) const {
    const V rest = Math::log(sum) * (Acc(1) / ln_base_);
    if constexpr (kIsPlain) {
      const auto is_as_it_was = (sum == Acc(1)) | (sum == Acc(0));
      return is_as_it_was ? largest_ : largest_ + rest;
    } else {
      const V merged = largest_.high + (largest_.low + rest);
      const auto is_alone = (sum == Acc(1)) & (largest_.low == Acc(0));
      const auto is_as_it_was = is_alone | (sum == Acc(0));
      return is_as_it_was ? largest_.high : merged;
    }
  }

 private:
  static constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  static constexpr bool kIsPlain = std::is_same_v<Lse, V>;

  static MERGE_ATTN_STATES_HOST_DEVICE V high(V lse) { return lse; }
  static MERGE_ATTN_STATES_HOST_DEVICE V high(PartLse<V> lse) { return lse.high; }
  static MERGE_ATTN_STATES_HOST_DEVICE Lse none() {
    if constexpr (kIsPlain) {
      return V{} - kInf;
    } else {
      return {V{} - kInf, V{}};
    }
  }

  Acc ln_base_;
  Lse largest_ = none();
  SumOfParts<V> sum_;
  int count_ = 0;
};

// In which base the LSEs of many parts are compared, and in which the merged one is wanted. Two
// natural ones without a sink are the pair's, bit for bit.
struct LseRule {
  Base base;
  Base out_base;
  bool is_pair;
};

template <class Acc, class V>
MERGE_ATTN_STATES_HOST_DEVICE V in_out_base(LseRule rule, V lse) {
  if (rule.base == rule.out_base) return lse;
  return lse * (rule.base == Base::kE ? 1 / kLn2<Acc> : kLn2<Acc>);
}

// What is left of a row's LSEs once its parts are weighed: the merged one, whose logarithm can wait
// until the weights are used.
template <class Math, class V, class Lse, bool kMayBeEmpty = true>
struct WeighedParts {
  LseRule rule;
  ManyLses<Math, V, Lse, kMayBeEmpty> merged;
  V sum;

  MERGE_ATTN_STATES_HOST_DEVICE V lse() const {
    return in_out_base<typename Math::Scalar>(rule, merged.lse(sum));
  }
};

// Weighs `count` parts, and a sink where `sink` points to one. part(k) gives the LSE of part k, V
// or PartLse<V>, and is asked twice; weight(k) is where its weight goes, and weight(count) where
// that of the sink does. Not for what LseRule calls a pair.
template <class Math, class V, class Lse, bool kMayBeEmpty = true, class Part, class Weight>
MERGE_ATTN_STATES_HOST_DEVICE WeighedParts<Math, V, Lse, kMayBeEmpty> weigh_parts(
    LseRule rule, int count, Part part, const Lse* sink, Weight weight) {
  ManyLses<Math, V, Lse, kMayBeEmpty> merged(rule.base);
  MERGE_ATTN_STATES_UNROLL
  for (int k = 0; k < count; ++k) merged.find(part(k));
  if (sink != nullptr) merged.find(*sink);
  MERGE_ATTN_STATES_UNROLL
  for (int k = 0; k < count; ++k) weight(k) = merged.add(part(k));
  V of_sink{};
  if (sink != nullptr) of_sink = merged.add(*sink);
  const V sum = merged.sum(), reciprocal = Math::reciprocal(sum);
  MERGE_ATTN_STATES_UNROLL
  for (int k = 0; k < count; ++k) weight(k) = merged.weight(weight(k), sum, reciprocal);
  if (sink != nullptr) weight(count) = merged.weight(of_sink, sum, reciprocal);
  return {rule, merged, sum};
}

// The same where two natural parts may be the pair.
template <class Math, class V, class Lse>
struct WeighedPairOrParts {
  WeighedParts<Math, V, Lse> parts;
  MergedLse<Math, V> pair{};

  MERGE_ATTN_STATES_HOST_DEVICE V lse() const {
    if (!parts.rule.is_pair) return parts.lse();
    return in_out_base<typename Math::Scalar>(parts.rule, pair.lse());
  }
};

template <class Math, class V, class Lse, class Part, class Weight>
MERGE_ATTN_STATES_HOST_DEVICE WeighedPairOrParts<Math, V, Lse> weigh_pair_or_parts(
    LseRule rule, int count, Part part, const Lse* sink, Weight weight) {
  if constexpr (std::is_same_v<Lse, V>) {
    if (rule.is_pair) {
      const auto pair = merge_lse<Math>(part(0), part(1));
      weight(0) = pair.weights.prefix;
      weight(1) = pair.weights.suffix;
      return {{rule, ManyLses<Math, V, Lse>(rule.base), V{}}, pair};
    }
  }
  return {weigh_parts<Math, V, Lse>(rule, count, part, sink, weight)};
}

// What the gradient of a row's merged output gives to its parts: the output's times the weight, and
// to the LSE of a part what follows. `dot` is the product of the part's values with the output's
// gradient, `mean` the weighted sum of these products, and `of_lse` the gradient of the merged LSE.
// A sink is a part whose values are 0.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE Acc lse_gradient(Base base, Base out_base, Acc weight, Acc dot,
                                               Acc mean, Acc of_lse) {
  return ln_of<Acc>(base) * weight * ((dot - mean) + of_lse / ln_of<Acc>(out_base));
}

}  // namespace merge_attn_states
