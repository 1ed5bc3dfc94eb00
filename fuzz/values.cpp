#include "values.h"

#include <algorithm>
#include <cmath>
#include <cstring>
#include <limits>

namespace merge_attn_states::fuzz {
namespace {

constexpr Format kFormats[] = {
    {MERGE_ATTN_STATES_FLOAT32, 23, 8, false},     {MERGE_ATTN_STATES_FLOAT16, 10, 5, false},
    {MERGE_ATTN_STATES_BFLOAT16, 7, 8, false},     {MERGE_ATTN_STATES_FLOAT64, 52, 11, false},
    {MERGE_ATTN_STATES_FLOAT8_E4M3FN, 3, 4, true}, {MERGE_ATTN_STATES_FLOAT8_E5M2, 2, 5, false}};

uint64_t mask(int bits) { return (uint64_t(1) << bits) - 1; }

long double decode(const Format& format, uint64_t code) {
  const uint64_t mantissa = code & mask(format.mantissa_bits);
  const uint64_t exponent = code >> format.mantissa_bits & mask(format.exponent_bits);
  const long double sign = code >> (format.bits() - 1) & 1 ? -1 : 1;
  if (exponent == mask(format.exponent_bits)) {
    const bool nan = format.finite ? mantissa == mask(format.mantissa_bits) : mantissa != 0;
    if (nan) return std::numeric_limits<long double>::quiet_NaN();
    if (!format.finite) return sign * std::numeric_limits<long double>::infinity();
  }
  const uint64_t whole = exponent == 0 ? mantissa : mantissa | uint64_t(1) << format.mantissa_bits;
  const int power = static_cast<int>(exponent == 0 ? 1 : exponent);
  return sign *
         std::ldexp(static_cast<long double>(whole), power - format.bias() - format.mantissa_bits);
}

void write_code(const Format& format, uint8_t* address, uint64_t code) {
  std::memcpy(address, &code, format.bits() / 8);  // little-endian
}

// In [1/4, 4): the exponent is drawn, sign and mantissa are as they come.
uint64_t ordinary(const Format& format, Random& random) {
  const uint64_t exponent = format.bias() - 2 + random.below(4);
  const uint64_t others = random.next() & ~(mask(format.exponent_bits) << format.mantissa_bits);
  return others | exponent << format.mantissa_bits;
}

// Differences around 103 and 745 are where float32 and float64 weights underflow.
double lse_number(Random& random) {
  constexpr double kInf = std::numeric_limits<double>::infinity();
  constexpr double kNumbers[] = {0,  -kInf, kInf,   NAN, 1e5,   -1e5,  3e38,  -3e38, 1,    -1,
                                 17, 88,    -104.5, 749, 1e-30, -kInf, 16.64, 2e-3,  -1e4, 1e30};
  if (random.below(3) == 0) return (static_cast<double>(random.below(1 << 20)) - (1 << 19)) / 65536;
  return kNumbers[random.below(std::size(kNumbers))];
}

}  // namespace

const Format& format_of(uint32_t dtype) {
  for (const Format& format : kFormats) {
    if (format.dtype == dtype) return format;
  }
  __builtin_trap();
}

bool is_known(uint32_t dtype) {
  for (const Format& format : kFormats) {
    if (format.dtype == dtype) return true;
  }
  return false;
}

bool is_fp8(uint32_t dtype) {
  return dtype == MERGE_ATTN_STATES_FLOAT8_E4M3FN || dtype == MERGE_ATTN_STATES_FLOAT8_E5M2;
}

long double Format::largest() const {
  const uint64_t first_past = finite ? mask(bits() - 1) : mask(exponent_bits) << mantissa_bits;
  return decode(*this, first_past - 1);
}

long double Format::ulp(long double value) const {
  int exponent = 0;
  std::frexp(value, &exponent);  // value = [1/2, 1) * 2^exponent
  const int power = value == 0 ? 1 - bias() : std::max(exponent - 1, 1 - bias());
  return std::ldexp(1.0L, power - mantissa_bits);
}

uint64_t code_at(const Format& format, const uint8_t* address) {
  uint64_t code = 0;
  std::memcpy(&code, address, format.bits() / 8);  // little-endian
  return code;
}

long double value_at(const Format& format, const uint8_t* address) {
  return decode(format, code_at(format, address));
}

bool can_be_filled(const Regions& regions, const Operand& operand) {
  const merge_attn_states_tensor& view = operand.view;
  const Region& region = regions[operand.region];
  if (!operand.given || view.rank > kMostDimensions) return false;
  if (!is_inside(view, region.bytes.get(), static_cast<int64_t>(region.size))) return false;
  const __int128 count = count_of(view);
  return count >= 0 && count < (1 << 16) &&
         std::all_of(view.sizes, view.sizes + view.rank, [](int64_t size) { return size >= 0; });
}

void fill(const Regions& regions, Random& random) {
  for (const Region& region : regions) {
    for (size_t i = 0; i < region.size; i += sizeof(uint64_t)) {
      const uint64_t bits = random.next();
      std::memcpy(&region.bytes[i], &bits, std::min(sizeof(bits), region.size - i));
    }
  }
}

void fill(const Regions& regions, const Operand& operand, bool is_lse, uint8_t oddity,
          Random& random) {
  if (!is_known(operand.view.dtype) || !can_be_filled(regions, operand)) return;
  const Format& format = format_of(operand.view.dtype);
  for_each_element(operand.view, [&](const Index&, uint8_t* address) {
    if (is_lse && format.dtype == MERGE_ATTN_STATES_FLOAT64) {
      const double number = lse_number(random);
      std::memcpy(address, &number, sizeof(number));
    } else if (is_lse && format.dtype == MERGE_ATTN_STATES_FLOAT32) {
      const float number = static_cast<float>(lse_number(random));
      std::memcpy(address, &number, sizeof(number));
    } else if (random.below(256) >= oddity) {
      write_code(format, address, ordinary(format, random));
    }  // else any bits, as they are
  });
}

}  // namespace merge_attn_states::fuzz
