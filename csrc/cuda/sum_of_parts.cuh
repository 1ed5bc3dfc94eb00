// What the parts of a row come to at some of its elements, in one thread's registers.
#pragma once

#include <utility>

#include "pack.cuh"

namespace merge_attn_states::cuda {

// f(std::integral_constant<int, k>) for each k below kCount: what is chosen by k is chosen when it
// is compiled.
template <int kCount, class F>
__device__ void for_each_part(F&& f) {
  const auto call = [&]<int... kParts>(std::integer_sequence<int, kParts...>) {
    (f(std::integral_constant<int, kParts>{}), ...);
  };
  call(std::make_integer_sequence<int, kCount>{});
}

// In place of a part that there is not: with weight 0 it changes no sum, not even -0.
template <class T, int kElements>
__device__ Pack<T, kElements> minus_zeros() {
  typename Pack<T, kElements>::Acc values[kElements];
#pragma unroll
  for (auto& value : values) value = -0.0f;
  return Pack<T, kElements>::pack(values);
}

// Instead of a part's number: the row is the sum, or has no part that is not empty.
inline constexpr int kSummed = -1, kNoPart = -2;

// Whether no part is empty, nor alone; then a place without a part gets weight 0.
template <int kMost>
__device__ bool takes_all_parts(float (&weights)[kMost], int num_parts) {
  float least = 0.0f;
#pragma unroll
  for (int k = 0; k < kMost; ++k) least = k < num_parts ? fminf(least, weights[k]) : least;
  if (least < 0.0f || num_parts == 1) return false;
#pragma unroll
  for (int k = 0; k < kMost; ++k) weights[k] = k < num_parts ? weights[k] : 0.0f;
  return true;
}

// Makes a row's empty parts, whose weights are negative, and the places without one such that they
// change no sum: weight 0, and leave_out(k) is to make minus_zeros of the values. Returns the part
// that is all of the row and is to be taken byte for byte, or kSummed or kNoPart.
template <int kMost, class LeaveOut>
__device__ int leave_out_empty(float (&weights)[kMost], int num_parts, LeaveOut leave_out) {
  int taken = kNoPart;
  for_each_part<kMost>([&](auto k) {
    if (k >= num_parts) {
      weights[k] = 0.0f;
    } else if (weights[k] < 0.0f) {
      weights[k] = 0.0f;
      leave_out(k);
    } else {
      taken = taken == kNoPart && weights[k] == 1.0f ? int{k} : kSummed;
    }
  });
  return taken;
}

// Sums all parts by their weights; unpack(k, values) gives the elements of part k.
template <int kMost, int kElements, class Unpack>
__device__ void sum_parts(const float (&weights)[kMost], Unpack unpack,
                          float (&values)[kElements]) {
  static_assert(kMost <= SumOfParts<float>::kAtOnce, "more are summed sixteen by sixteen");
  for_each_part<kMost>([&](auto k) {
    float of_part[kElements];
    unpack(k, of_part);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      values[i] = k == 0 ? weights[0] * of_part[i] : add_product(values[i], weights[k], of_part[i]);
    }
  });
}

}  // namespace merge_attn_states::cuda
