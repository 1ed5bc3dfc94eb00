// Structs of callers that were compiled against an older or a newer header than this library.
#pragma once

#include <algorithm>
#include <cstring>
#include <string>

#include "refuse.h"

namespace merge_attn_states {

// No struct of any version is larger: a size beyond was never set.
inline constexpr size_t kLargestStruct = 4096;

// `smallest` are the bytes that every caller's struct has.
template <class Struct>
size_t checked_struct_size(const Struct* given, Name name, size_t smallest) {
  if (given == nullptr) refuse(name, [] { return "expected a struct, got null"; });
  const size_t size = given->struct_size;
  if (size < smallest || size > kLargestStruct) {
    refuse(name, [&] {
      return "expected a struct_size in [" + std::to_string(smallest) + ", " +
             std::to_string(kLargestStruct) + "], got " + std::to_string(size);
    });
  }
  return size;
}

// Not inlined: most callers were compiled against this very header.
template <class Struct>
[[gnu::noinline]] const Struct& of_other_version(const Struct* given, Name name, size_t smallest,
                                                 Struct& storage) {
  const size_t size = checked_struct_size(given, name, smallest);
  const auto* bytes = reinterpret_cast<const unsigned char*>(given);
  if (size > sizeof(Struct) &&
      std::any_of(bytes + sizeof(Struct), bytes + size, [](unsigned char byte) { return byte; })) {
    refuse(name, [&] {
      return "expected nothing behind the " + std::to_string(sizeof(Struct)) +
             " bytes that this library knows, got a struct_size of " + std::to_string(size) +
             " with a field set there: the library is older than the program";
    });
  }
  storage = {};
  std::memcpy(&storage, given, std::min(size, sizeof(Struct)));
  return storage;
}

// The struct in this library's form. What an older caller does not have is 0; a newer caller's
// further fields must be 0, since this library would not do what they ask. `storage` serves where
// the sizes differ.
template <class Struct>
const Struct& of_this_version(const Struct* given, Name name, size_t smallest, Struct& storage) {
  if (given != nullptr && given->struct_size == sizeof(Struct)) return *given;
  return of_other_version(given, name, smallest, storage);
}

}  // namespace merge_attn_states
