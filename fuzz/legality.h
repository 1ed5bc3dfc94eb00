// Which calls are legal: the contract read a second time, element by element and byte by byte.
#pragma once

#include "call.h"
#include "touch.h"

namespace merge_attn_states::fuzz {

// The arguments that a refusal may name; none: the call is legal. Later rules are not looked at
// where an earlier one is broken, since they have no meaning there.
Names faulty_arguments(const Call& call);

}  // namespace merge_attn_states::fuzz
