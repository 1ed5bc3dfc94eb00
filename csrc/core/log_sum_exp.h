// log(exp(a) + exp(b)) in float32 as a GPU computes it, for state.h. Merges follow one another, and
// each adds its error to the LSE of the one before; so it is within little more than half an ulp.
#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

#include "host_device.h"

namespace merge_attn_states {

// a + b = sum + rest, exactly.
struct TwoSum {
  float sum;
  float rest;

  MERGE_ATTN_STATES_HOST_DEVICE TwoSum(float a, float b) : sum(a + b) {
    const float of_b = sum - a;
    rest = (a - (sum - of_b)) + (b - of_b);
  }
};

// Of -126 to 127.
MERGE_ATTN_STATES_HOST_DEVICE float power_of_two(int32_t exponent) {
  const int32_t bits = (127 + exponent) << 23;
  float value;
  memcpy(&value, &bits, sizeof(value));
  return value;
}

// log(exp(larger) + exp(smaller)), smaller <= larger; e is exp(smaller - larger) within an ulp or
// two, and weight is 1 / (1 + e). It is the float32 next to the exact value in nearly every row,
// where a GPU's own exp and log2 are several times further off (docs/experiments.md).
//
// log(1 + x) = x - x^2 / 2 + x^3 S(x), whose first two terms are added exactly. e's own error is
// what exp(r - n ln 2) = 2^-n (1 + r + r^2 Q(r)) differs from it by, and counts with weight. S and
// Q are minimax polynomials. They are evaluated side by side, since a block ends with this.
MERGE_ATTN_STATES_HOST_DEVICE float precise_log_sum_exp(float larger, float smaller, float e,
                                                        float weight) {
  const TwoSum distance(larger, -smaller);
  // NaN stays in distance.rest. Beyond 87 e is below 2^-125, and what is taken for it as well.
  const float d = fminf(distance.sum, 87.0f);
  const float n = rintf(d * 1.44269504f);
  const float r = fmaf(n, 0.693147182f, -d), r_rest = fmaf(n, -1.90465421e-9f, -distance.rest);
  const float r2 = r * r;
  const float q_low = fmaf(r, 0.1666651964f, 0.5f),
              q_high = fmaf(r, 0.00836888235f, 0.04166620597f);
  const float q = fmaf(r2, fmaf(r2, 0.001395047875f, q_high), q_low);
  const float lead = 1.0f + r;
  const float further = fmaf(r2, q, r_rest) + (r - (lead - 1.0f));
  const float power = power_of_two(-static_cast<int32_t>(n));
  const float e_rest = fmaf(further, power, lead * power - e);

  const float e2 = e * e, e2_rest = fmaf(e, e, -e2), e4 = e2 * e2;
  const float s_0 = fmaf(e, -0.2495967150f, 0.3333120942f);
  const float s_2 = fmaf(e, -0.1529333144f, 0.1968388408f);
  const float s_4 = fmaf(e, -0.05613103136f, 0.1054504290f);
  const float s_6 = fmaf(e, -0.003110780846f, 0.01931765862f);
  const float s = fmaf(e4, fmaf(e2, s_6, s_4), fmaf(e2, s_2, s_0));

  const TwoSum first(larger, e), second(first.sum, -0.5f * e2);
  const float rest = fmaf(e_rest, weight, fmaf(e2_rest, -0.5f, first.rest + second.rest));
  return second.sum + fmaf(e2 * e, s, rest);
}

}  // namespace merge_attn_states
