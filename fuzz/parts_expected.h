// What an accepted call of many parts must leave behind, computed row by row from what the memory
// held before it. Slow, in long double, and without a line of csrc.
#pragma once

#include "parts_call.h"

namespace merge_attn_states::fuzz {

// Of a merge or an update. False where of some row nothing is promised.
bool check_merged(const CallOfParts& call);

void check_gradients(const CallOfParts& call);

}  // namespace merge_attn_states::fuzz
