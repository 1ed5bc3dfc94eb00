// The CUDA driver's functions: those that the runtime has no equal for, and those that cost less
// than the runtime's, in time and in memory that a call finds in no cache.
#pragma once

#include <cuda.h>
#include <vector_types.h>

#include <optional>

namespace merge_attn_states::cuda {

// Looked up in the driver that is loaded. Whatever it refuses, or is too old for, is for the caller
// to ask the runtime again, whose errors have sentences.
class Driver {
 public:
  Driver();

  // Of the thread's current context; a thread that has not called the runtime yet has none.
  std::optional<int> current_device() const;
  bool launch(CUkernel kernel, dim3 grid, dim3 block, void** parameters, void* stream) const;
  // Whether the device has the context that the runtime uses. Where that is unknown, true.
  bool has_context(int device) const;
  // That context on top of the thread's stack, made where there is none.
  bool push_context(int device) const;
  void pop_context(int device) const;

 private:
  decltype(&cuCtxGetDevice) get_device_ = nullptr;
  decltype(&cuLaunchKernel) launch_ = nullptr;
  decltype(&cuDevicePrimaryCtxGetState) get_state_ = nullptr;
  decltype(&cuDevicePrimaryCtxRetain) retain_ = nullptr;
  decltype(&cuDevicePrimaryCtxRelease) release_ = nullptr;
  decltype(&cuCtxPushCurrent) push_ = nullptr;
  decltype(&cuCtxPopCurrent) pop_ = nullptr;
};

const Driver& driver();

}  // namespace merge_attn_states::cuda
