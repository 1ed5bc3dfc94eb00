// One property of one operand is made odd.
#pragma once

#include "operand.h"

namespace merge_attn_states::fuzz {

inline constexpr uint32_t kF32 = MERGE_ATTN_STATES_FLOAT32, kF16 = MERGE_ATTN_STATES_FLOAT16,
                          kBF16 = MERGE_ATTN_STATES_BFLOAT16, kF64 = MERGE_ATTN_STATES_FLOAT64,
                          kE4M3 = MERGE_ATTN_STATES_FLOAT8_E4M3FN,
                          kE5M2 = MERGE_ATTN_STATES_FLOAT8_E5M2;

template <class T, size_t n>
const T& pick(const T (&table)[n], uint8_t byte) {
  return table[byte % n];
}

// `kind` below kCallFault are such properties, as is the last one; those between are the call's.
inline constexpr uint8_t kFaults = 16, kStructFault = 13, kCallFault = 14;
void make_odd(Operand& operand, uint8_t kind, uint8_t index, int64_t number);

}  // namespace merge_attn_states::fuzz
