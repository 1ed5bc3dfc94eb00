// How an argument is refused.
#pragma once

#include <stdexcept>
#include <string>

namespace merge_attn_states {

// The sentence is made only here; neither this nor what makes it is inlined into the checks.
template <class Sentence>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(const char* name, const Sentence& sentence) {
  throw std::invalid_argument(std::string(name) + ": " + sentence());
}

}  // namespace merge_attn_states
