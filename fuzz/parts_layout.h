// Where the operands of a described call of many parts lie, what is odd about it, and what its
// memory holds.
#pragma once

#include <utility>

#include "parts_call.h"

namespace merge_attn_states::fuzz {

// Where in the input a part's bytes stand: behind those of the call, and of further parts again
// those of the first ones.
inline constexpr size_t kHeaderBytes = 22, kPartBytes = 31, kPartBlocks = 3;
inline size_t bytes_of_part(size_t k) { return kHeaderBytes + k % kPartBlocks * kPartBytes; }

// Strides and places; what is written lies on the parts more often than on anything else. Returns
// how each operand's memory is to be declared.
std::vector<std::pair<Operand*, uint8_t>> lay_out(CallOfParts& call, Bytes& bytes);

// A result becomes one part of the stack.
void lay_on_stack(CallOfParts& call, Operand& result, const Operand& stack, int64_t part);

void apply_fault(CallOfParts& call, Bytes& bytes);

void fill(CallOfParts& call, uint8_t oddity, Random& random);

}  // namespace merge_attn_states::fuzz
