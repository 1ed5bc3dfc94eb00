// The bases of LSEs as text, as both ways in have them: a letter for all parts or one for each.
#pragma once

#include <cstdint>
#include <string_view>

#include "../../include/merge_attn_states.h"

namespace merge_attn_states {

// Of part k, where the text has one letter, or one for each part and more than one.
inline std::string_view base_of_part(std::string_view bases, size_t k) {
  return bases.substr(bases.size() == 1 ? 0 : k, 1);
}

// "e" or "2"; false for any other text.
inline bool read_base(std::string_view text, int32_t& base) {
  base = text == "2" ? MERGE_ATTN_STATES_BASE_2 : MERGE_ATTN_STATES_BASE_E;
  return text == "e" || text == "2";
}

}  // namespace merge_attn_states
