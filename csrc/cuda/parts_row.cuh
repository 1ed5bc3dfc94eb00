// What the kernels of many parts say of a row's parts.
#pragma once

#include <utility>

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

// Instead of a part's number: the row is the sum, or has no part that is not empty.
inline constexpr int kSummed = -1, kNoPart = -2;

}  // namespace merge_attn_states::cuda
