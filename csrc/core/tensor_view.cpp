// How a view looks in a message. Cold: runs only when a call is refused.
#include "tensor_view.h"

#include <iterator>

namespace merge_attn_states {

std::string dtype_name(uint32_t dtype) {
  const uint32_t code = dtype & 0xff, bits = dtype >> 8 & 0xff, lanes = dtype >> 16;
  // DLPack's type codes in their order; one without a width in its name is complete.
  static constexpr struct {
    const char* name;
    bool with_bits;
  } kCodes[] = {{"int", true},
                {"uint", true},
                {"float", true},
                {"a dtype without a DLPack code", false},
                {"bfloat", true},
                {"complex", true},
                {"bool", false},
                {"float8_e3m4", false},
                {"float8_e4m3", false},
                {"float8_e4m3b11fnuz", false},
                {"float8_e4m3fn", false},
                {"float8_e4m3fnuz", false},
                {"float8_e5m2", false},
                {"float8_e5m2fnuz", false},
                {"float8_e8m0fnu", false},
                {"float6_e2m3fn", false},
                {"float6_e3m2fn", false},
                {"float4_e2m1fn", false}};
  if (code >= std::size(kCodes)) return "dtype code " + std::to_string(code);
  std::string name = kCodes[code].name;
  if (kCodes[code].with_bits) name += std::to_string(bits);
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
