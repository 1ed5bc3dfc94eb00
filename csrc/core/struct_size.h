// Structs of callers that were compiled against an older or a newer header than this library.
#pragma once

#include <algorithm>
#include <cstring>
#include <stdexcept>
#include <string>

namespace merge_attn_states {

// The struct in this library's form. What an older caller does not have is 0; a newer caller's
// further fields must be 0, since this library would not do what they ask. `smallest` are the
// bytes that every caller has; `storage` serves where the sizes differ.
template <class Struct>
const Struct& of_this_version(const Struct* given, const char* name, size_t smallest,
                              Struct& storage) {
  if (given != nullptr && given->struct_size == sizeof(Struct)) return *given;
  const auto refuse = [&](const std::string& sentence) {
    throw std::invalid_argument(std::string(name) + ": " + sentence);
  };
  if (given == nullptr) refuse("expected a struct, got null");
  const size_t size = given->struct_size;
  if (size < smallest) {
    refuse("expected a struct_size of at least " + std::to_string(smallest) + ", got " +
           std::to_string(size));
  }
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (size > sizeof(Struct) &&
      std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char byte) { return byte; })) {
    refuse("expected nothing behind the " + std::to_string(sizeof(Struct)) +
           " bytes that this library knows, got a struct_size of " + std::to_string(size) +
           " with a field set there: the library is older than the program");
  }
  storage = {};
  std::memcpy(&storage, given, std::min(size, sizeof(Struct)));
  return storage;
}

}  // namespace merge_attn_states
