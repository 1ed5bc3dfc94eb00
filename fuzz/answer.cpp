#include "answer.h"

#include <cstdio>

#include "estimate.h"

namespace merge_attn_states::fuzz {

void check_ended(const char* message, size_t size) {
  if (std::memchr(message, '\0', size) == nullptr) fail("message not ended");
}

void check_sentence(const Names& faulty, const Answer& whole, const Answer& cut, size_t size) {
  const std::string name = whole.message.substr(0, whole.message.find(": "));
  if (cut.status != whole.status) fail("two calls disagree: %s", name.c_str());
  if (whole.message.size() < name.size() + 10 || faulty.count(name) == 0) {
    fail("refused, but %s is not at fault: %s", name.c_str(), whole.message.c_str());
  }
  if (size > 0 && cut.message != whole.message.substr(0, size - 1)) {
    fail("another sentence: %s", cut.message.c_str());
  }
}

void describe(const Regions& regions, const Operand& operand) {
  const auto& view = operand.view;
  const Region& region = regions[operand.region];
  std::string dims;
  for (int32_t i = 0; i < view.rank && view.sizes != nullptr && view.strides != nullptr; ++i) {
    dims += " " + std::to_string(view.sizes[i]) + ":" + std::to_string(view.strides[i]);
  }
  std::fprintf(stderr,
               "%-13s %s dtype %06x device %d:%d rank %d size:stride%s, data %p, memory %p + %ld, "
               "really %p + %zu\n",
               operand.name.c_str(), operand.given ? "" : "(not given)", view.dtype,
               view.device_type, view.device_index, view.rank, dims.c_str(), view.data, view.memory,
               view.memory_bytes, static_cast<void*>(region.bytes.get()), region.size);
}

}  // namespace merge_attn_states::fuzz
