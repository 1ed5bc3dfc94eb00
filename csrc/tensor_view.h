// The border: what a translator hands over and what it looks like in a message.
//
// A TensorView is the C entry's own tensor struct. In front of it stand the translators (ops.cpp
// for Torch, module.cpp for Python); behind it plain C++ and CUDA that know neither.
#pragma once

#include <string>

#include "../include/merge_attn_states.h"

namespace merge_attn_states {

using TensorView = merge_attn_states_tensor;

// "float32", "int64", "bool", or "dtype code 99" for one that DLPack does not name.
std::string dtype_name(uint32_t dtype);

// "cpu", "cuda:1", or "device type 8".
std::string device_name(int32_t device_type, int32_t device_index);

// "[2, 4]"
std::string list(const int64_t* values, int32_t count);

}  // namespace merge_attn_states
