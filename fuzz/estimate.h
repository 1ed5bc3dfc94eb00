// Numbers with the error that they may have, and what an accepted call must have left alone. In
// long double, and without a line of csrc.
#pragma once

#include <limits>

#include "operand.h"
#include "values.h"

namespace merge_attn_states::fuzz {

using Real = long double;
inline constexpr Real kInf = std::numeric_limits<Real>::infinity();

// Ends the process with a sentence, and so makes the input a finding.
[[noreturn]] void fail(const char* format, ...) __attribute__((format(printf, 1, 2)));

// Of the arithmetic of inputs of this dtype.
Real epsilon(uint32_t dtype);

// Where exp(-difference) may be 0 or not, as the precision decides.
struct Underflow {
  Real surely_0, surely_not_0;
  explicit Underflow(uint32_t dtype);
  Real exp(Real difference) const;  // of -difference
  bool is_undecided(Real difference) const;
};

// A value with the error that arithmetic in float32 (or float64) may have.
struct Estimate {
  Real value;
  Real error;
  bool or_nan = false;  // infinity times a weight about which the precision decides: 0 or not
};

Estimate divide(const Estimate& value, Real scale, Real eps);

bool is_close(const Format& format, Real got, const Estimate& expected, bool saturates);

// Every byte of every region is as it was, but for the elements of what is written.
void check_untouched(const Regions& regions, const std::vector<const Operand*>& written);

// What the memory holds, and what it held before the call.
std::vector<std::vector<uint8_t>> copy_of(const Regions& regions);
void restore(const Regions& regions);

// What is written holds the same bits as in a copy.
void check_same(const Regions& regions, const std::vector<const Operand*>& written,
                const std::vector<std::vector<uint8_t>>& copy);

}  // namespace merge_attn_states::fuzz
