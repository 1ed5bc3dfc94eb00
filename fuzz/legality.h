// Which calls are legal: the contract read a second time, element by element and byte by byte.
#pragma once

#include <set>
#include <string>

#include "call.h"

namespace merge_attn_states::fuzz {

// What a struct may be, whatever its version: past that its size was never set.
inline constexpr size_t kLargestStruct = 4096;

// The arguments that a refusal may name; none: the call is legal. Later rules are not looked at
// where an earlier one is broken, since they have no meaning there.
std::set<std::string> faulty_arguments(const Call& call);

}  // namespace merge_attn_states::fuzz
