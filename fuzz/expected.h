// What an accepted call must leave behind, computed element by element from what the memory held
// before it. Slow, in long double, and without a line of csrc.
#pragma once

#include "call.h"

namespace merge_attn_states::fuzz {

// Ends the process with a sentence, and so makes the input a finding.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Every byte of every region is as it was, but for the elements of output and output_lse, which
// `written` tells apart.
void check_untouched(const Call& call, bool written);

void check_output(const Call& call);
void check_output_lse(const Call& call);

}  // namespace merge_attn_states::fuzz
