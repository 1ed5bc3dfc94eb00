// Where an operand lies: its strides, the memory that holds it, and what the library is told of it.
#pragma once

#include <functional>

#include "operand.h"

namespace merge_attn_states::fuzz {

// The input, byte by byte; zeros behind its end.
class Bytes {
 public:
  Bytes(const uint8_t* data, size_t size) : data_(data), size_(size) {}
  uint8_t next() { return at_++ < size_ ? data_[at_ - 1] : 0; }
  size_t at() const { return at_; }
  void seek(size_t at) { at_ = at; }
  int64_t odd_number();  // at or near one where 32-bit or 64-bit arithmetic breaks

 private:
  const uint8_t* data_;
  size_t size_;
  size_t at_ = 0;
};

inline constexpr size_t kSharedBytes = 4096;

void read_strides(Operand& operand, Bytes& bytes);

// Alone in memory of its own, somewhere in the shared region, on an earlier operand, or where that
// one begins. `partner` chooses it; null: there is none.
void place(Regions& regions, Operand& operand, Bytes& bytes,
           const std::function<Operand*(uint8_t)>& partner);

// Says where the memory is, truly, narrowly or wrongly. What lies outside is always told: the
// library cannot know it otherwise, and would be right to believe the caller.
void declare_memory(const Region& region, merge_attn_states_tensor& view, uint8_t mode);

}  // namespace merge_attn_states::fuzz
