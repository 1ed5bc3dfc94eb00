// A stack taken apart: what lies along one dimension of a tensor, each as a tensor of its own.
#pragma once

#include "dtypes.h"
#include "tensor_view.h"

namespace merge_attn_states {

// The parts differ in their addresses alone. The sizes and strides that all of them have are
// written to `layout`, which they borrow: rank - 1 numbers each.
class PartsOfStack {
 public:
  PartsOfStack(const TensorView& stack, int dim, int64_t* layout)
      : first_(stack),
        stride_(stack.strides[dim]),
        element_bytes_(size_of(static_cast<DType>(stack.dtype))) {
    first_.rank = stack.rank - 1;
    first_.sizes = layout;
    first_.strides = layout + first_.rank;
    for (const int64_t* numbers : {stack.sizes, stack.strides}) {
      for (int i = 0; i < stack.rank; ++i) {
        if (i != dim) *layout++ = numbers[i];
      }
    }
  }

  TensorView operator[](int64_t k) const {
    TensorView part = first_;
    part.data = static_cast<char*>(part.data) + k * stride_ * element_bytes_;
    return part;
  }

 private:
  TensorView first_;
  int64_t stride_, element_bytes_;
};

}  // namespace merge_attn_states
