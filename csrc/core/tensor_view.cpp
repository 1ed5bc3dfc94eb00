// How a view looks in a message. Cold: runs only when a call is refused.
#include "tensor_view.h"

#include <iterator>

namespace merge_attn_states {

std::string dtype_name(uint32_t dtype) {
  const uint32_t code = dtype & 0xff, bits = dtype >> 8 & 0xff, lanes = dtype >> 16;
  // DLPack's type codes in their order, and the width that the name stands for.
  constexpr uint32_t kShown = 0, kAny = ~0u;
  static constexpr struct {
    const char* name;
    uint32_t bits;
  } kCodes[] = {{"int", kShown},       {"uint", kShown},
                {"float", kShown},     {"a dtype without a DLPack code", kAny},
                {"bfloat", kShown},    {"complex", kShown},
                {"bool", 8},           {"float8_e3m4", 8},
                {"float8_e4m3", 8},    {"float8_e4m3b11fnuz", 8},
                {"float8_e4m3fn", 8},  {"float8_e4m3fnuz", 8},
                {"float8_e5m2", 8},    {"float8_e5m2fnuz", 8},
                {"float8_e8m0fnu", 8}, {"float6_e2m3fn", 6},
                {"float6_e3m2fn", 6},  {"float4_e2m1fn", 4}};
  if (code >= std::size(kCodes)) return "dtype code " + std::to_string(code);
  const auto& [text, width] = kCodes[code];
  std::string name = text;
  if (width == kShown) {
    name += std::to_string(bits);
  } else if (width != kAny && width != bits) {
    name += " of " + std::to_string(bits) + " bits";
  }
  if (lanes != 1) name += "_x" + std::to_string(lanes);
  return name;
}

std::string device_name(int32_t device_type, int32_t device_index) {
  switch (device_type) {
    case MERGE_ATTN_STATES_CPU:
      return "cpu";
    case MERGE_ATTN_STATES_CUDA:
      return "cuda:" + std::to_string(device_index);
    default:
      return "device type " + std::to_string(device_type);
  }
}

std::string list(const int64_t* values, int32_t count) {
  std::string text = "[";
  for (int32_t i = 0; i < count; ++i) text += (i ? ", " : "") + std::to_string(values[i]);
  return text + "]";
}

}  // namespace merge_attn_states
