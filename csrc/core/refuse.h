// How an argument is refused.
#pragma once

#include <cstdint>
#include <stdexcept>
#include <string>

namespace merge_attn_states {

// Of an argument, or of one part's: "lses[3]".
struct Name {
  const char* text;
  int32_t part = -1;

  constexpr Name(const char* text, int32_t part = -1) : text(text), part(part) {}
  std::string str() const {
    return part < 0 ? text : std::string(text) + "[" + std::to_string(part) + "]";
  }
};

// The sentence is made only here; neither this nor what makes it is inlined into the checks.
template <class Sentence>
[[noreturn, gnu::cold, gnu::noinline]] void refuse(Name name, const Sentence& sentence) {
  throw std::invalid_argument(name.str() + ": " + sentence());
}

}  // namespace merge_attn_states
