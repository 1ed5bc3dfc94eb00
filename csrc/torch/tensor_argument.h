// A tensor among an operator's arguments, and what the C entry's struct says of it.
#pragma once

#include <torch/csrc/stable/tensor.h>

#include <optional>
#include <stdexcept>

#include "../core/refuse.h"
#include "stable_tensor.h"

namespace merge_attn_states {

using OptionalTensor = std::optional<torch::stable::Tensor>;

// None and an undefined tensor are not given.
inline bool is_given(const OptionalTensor& tensor) {
  return tensor.has_value() && tensor->defined();
}

struct TensorArgument {
  OptionalTensor tensor;
  TensorView view{};

  void describe(Name name, bool written) {
    if (!is_given(tensor)) return;
    if (!merge_attn_states::describe(tensor->get(), written, view)) {
      throw std::runtime_error(name.str() +
                               ": expected a tensor with memory and strides, got one that PyTorch "
                               "describes otherwise");
    }
  }
  const TensorView* get() const { return is_given(tensor) ? &view : nullptr; }
};

}  // namespace merge_attn_states
