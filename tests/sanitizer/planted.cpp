// Two errors on purpose, compiled into the sanitizer build alone and with its flags: a build that
// lets them pass would prove nothing about the tests that it runs. test_sanitizer.py calls them.
#include <cstdint>

#define PLANTED extern "C" __attribute__((visibility("default"), noinline))

// Reads values[count], one element past the end.
PLANTED int32_t merge_attn_states_planted_overread(const int32_t* values, int64_t count) {
  int32_t sum = 0;
  for (int64_t i = 0; i <= count; ++i) sum ^= values[i];
  return sum;
}

// Overflows for the largest value.
PLANTED int64_t merge_attn_states_planted_overflow(int64_t value) { return value + 1; }
