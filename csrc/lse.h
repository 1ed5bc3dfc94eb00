// The only formula, for host and device: section 2.2 of arXiv 2501.01005 for two parts.
//
//     m = max(lse_p, lse_s)      w_i = exp(lse_i - m) / sum_j exp(lse_j - m)
//     O = w_p O_p + w_s O_s      lse = m + log(sum_j exp(lse_j - m))
//
// With e = exp(-|lse_p - lse_s|) the larger part weighs 1 / (1 + e), the smaller e / (1 + e), and
// lse = m + log1p(e): one exponential, no overflow, and an exact sum of weights within an ulp.
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

#ifdef __CUDACC__
#define MERGE_ATTN_STATES_HOST_DEVICE __host__ __device__ __forceinline__
#else
// Always inlined: the CPU kernels are built twice, and one copy of a function that both use must
// not stand for the other.
#define MERGE_ATTN_STATES_HOST_DEVICE inline __attribute__((always_inline))
#endif

namespace merge_attn_states {

// The weight of an empty part: its values are never used, not even times zero, since 0 * NaN is
// NaN. A real weight is never negative; one that underflows to 0 still multiplies.
inline constexpr float kSkip = -1.0f;

template <class Acc>
struct Weights {
  Acc prefix;
  Acc suffix;

  MERGE_ATTN_STATES_HOST_DEVICE bool skips_prefix() const { return prefix < Acc(0); }
  MERGE_ATTN_STATES_HOST_DEVICE bool skips_suffix() const { return suffix < Acc(0); }
};

template <class Acc>
struct MergedLse {
  Weights<Acc> weights;
  Acc lse;
};

template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE MergedLse<Acc> merge_lse(Acc prefix_lse, Acc suffix_lse) {
  constexpr Acc kInf = std::numeric_limits<Acc>::infinity();
  const bool prefix_empty = std::fabs(prefix_lse) == kInf;
  const bool suffix_empty = std::fabs(suffix_lse) == kInf;
  const bool any_nan = prefix_lse != prefix_lse || suffix_lse != suffix_lse;
  if ((prefix_empty || suffix_empty) && !any_nan) {
    const Acc lse = !prefix_empty ? prefix_lse : !suffix_empty ? suffix_lse : -kInf;
    return {{prefix_empty ? Acc(kSkip) : Acc(1), suffix_empty ? Acc(kSkip) : Acc(1)}, lse};
  }
  const Acc difference = prefix_lse - suffix_lse;
  const Acc e = std::exp(-std::fabs(difference));
  const Acc larger = Acc(1) / (Acc(1) + e);
  const Acc smaller = e * larger;
  const bool prefix_leads = difference >= Acc(0);
  const Acc lse = (prefix_leads ? prefix_lse : suffix_lse) + std::log1p(e);
  return {{prefix_leads ? larger : smaller, prefix_leads ? smaller : larger}, lse};
}

// A token past the context count: the suffix as it is, its lse raw.
template <class Acc>
MERGE_ATTN_STATES_HOST_DEVICE MergedLse<Acc> take_suffix(Acc suffix_lse) {
  return {{Acc(kSkip), Acc(1)}, suffix_lse};
}

// V is Acc or a vector of them.
template <class V, class Acc>
MERGE_ATTN_STATES_HOST_DEVICE V blend(Weights<Acc> weights, V prefix, V suffix) {
  return weights.prefix * prefix + weights.suffix * suffix;
}

}  // namespace merge_attn_states
