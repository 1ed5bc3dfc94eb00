// Numbers of every dtype, decoded by the definition of the format, and what the memory is filled
// with.
#pragma once

#include <cstdint>

#include "operand.h"

namespace merge_attn_states::fuzz {

// xorshift64*: reproducible from the input alone.
class Random {
 public:
  explicit Random(uint64_t seed) : state_(seed * 2 + 0x9e3779b97f4a7c15) {}
  uint64_t next() {
    state_ ^= state_ >> 12, state_ ^= state_ << 25, state_ ^= state_ >> 27;
    return state_ * 0x2545f4914f6cdd1d;
  }
  uint32_t below(uint32_t limit) { return static_cast<uint32_t>((next() >> 33) % limit); }

 private:
  uint64_t state_;
};

// A binary floating-point format. `finite`: no infinities, the highest code alone is NaN.
struct Format {
  uint32_t dtype;
  int mantissa_bits;
  int exponent_bits;
  bool finite;

  int bits() const { return 1 + mantissa_bits + exponent_bits; }
  int bias() const { return (1 << (exponent_bits - 1)) - 1; }
  long double largest() const;
  long double ulp(long double value) const;  // the distance of neighbours where |value| lies
};

const Format& format_of(uint32_t dtype);
bool is_known(uint32_t dtype);
bool is_fp8(uint32_t dtype);

uint64_t code_at(const Format& format, const uint8_t* address);
long double value_at(const Format& format, const uint8_t* address);

// Random bytes everywhere.
void fill(const Regions& regions, Random& random);

// Random numbers near 1 and, the more the higher `oddity`, any bits. LSEs hold all the numbers of
// the empty rule. What does not lie in its memory stays as it is.
void fill(const Regions& regions, const Operand& operand, bool is_lse, uint8_t oddity,
          Random& random);
bool can_be_filled(const Regions& regions, const Operand& operand);

}  // namespace merge_attn_states::fuzz
