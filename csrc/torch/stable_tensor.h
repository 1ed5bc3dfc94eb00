// What both translators ask of PyTorch, by its stable C functions alone: a tensor as a view, and
// the current stream. Knows neither Python nor an operator.
#pragma once

#include <torch/csrc/inductor/aoti_torch/c/shim.h>

#include "../core/tensor_view.h"

namespace merge_attn_states {

// False where PyTorch has no memory with strides behind the tensor. An input is only read, so that
// it stays lazy if it is a copy-on-write clone; one that is written becomes a tensor of its own.
// Outputs first: an input that is the same tensor has to see its new memory.
bool describe(AtenTensorHandle tensor, bool written, TensorView& view);

// PyTorch's number of a dtype as DLPack's; one that is none of these is one without a code.
uint32_t dlpack_dtype(int32_t scalar_type);

// PyTorch's current stream of the tensor's device; null on the CPU.
void* current_stream(const TensorView& tensor);

}  // namespace merge_attn_states
