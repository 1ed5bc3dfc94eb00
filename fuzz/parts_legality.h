// Which calls of many parts are legal: their contract read a second time.
#pragma once

#include "parts_call.h"
#include "touch.h"

namespace merge_attn_states::fuzz {

// The arguments that a refusal may name; none: the call is legal. Later rules are not looked at
// where an earlier one is broken, since they have no meaning there.
Names faulty_arguments(const CallOfParts& call);

// The later rules, which need memory: what lies nowhere, what may not be written, and what indices
// and the number of parts may not be.
Names misplaced(const CallOfParts& call);
Names overlapping(const CallOfParts& call);
Names out_of_range(const CallOfParts& call);

// Elements without number, of a stride 0: nobody waits for such a call.
bool takes_too_long(const CallOfParts& call);

}  // namespace merge_attn_states::fuzz
