// Where an operand lies: its strides, the memory that holds it, and what the library is told of it.
#pragma once

#include "call.h"

namespace merge_attn_states::fuzz {

// The input, byte by byte; zeros behind its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t next() { return at_ < size_ ? data_[at_++] : 0; }
  int64_t odd_number();  // at or near one where 32-bit or 64-bit arithmetic breaks

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

inline constexpr size_t kSharedBytes = 4096;

int add_region(Call& call, size_t size);

// Lets the view see the operand's sizes and strides.
void point_view(Operand& operand);

void read_strides(Operand& operand, Bytes& bytes);

// Alone in memory of its own, somewhere in the shared region, on an earlier operand, or where that
// one begins.
void place(Call& call, Role role, Bytes& bytes);

// Says where the memory is, truly, narrowly or wrongly. What lies outside is always told: the
// library cannot know it otherwise, and would be right to believe the caller.
void declare_memory(const Call& call, Operand& operand, uint8_t mode);

}  // namespace merge_attn_states::fuzz
