// The CUDA driver's functions: those that the runtime has no equal for, and those that cost less
// than the runtime's, in time and in memory that a call finds in no cache.
#pragma once

#include <cudaTypedefs.h>
#include <vector_types.h>

#include <optional>

namespace merge_attn_states::cuda {

// Whatever it refuses, or lacks, is for the caller to ask the runtime again, whose errors have
// sentences.
class Driver {
 public:
  Driver();

  // Of the thread's current context; a thread that has not called the runtime yet has none.
  std::optional<int> current_device() const;
  bool launch(CUkernel kernel, dim3 grid, dim3 block, void** parameters, void* stream) const;
  // The device's context that the runtime uses, on top of the thread's stack.
  bool push_context(int device) const;
  void pop_context(int device) const;

 private:
  PFN_cuCtxGetDevice_v2000 get_device_ = nullptr;
  PFN_cuLaunchKernel_v4000 launch_ = nullptr;
  PFN_cuDevicePrimaryCtxRetain_v7000 retain_ = nullptr;
  PFN_cuDevicePrimaryCtxRelease_v11000 release_ = nullptr;
  PFN_cuCtxPushCurrent_v4000 push_ = nullptr;
  PFN_cuCtxPopCurrent_v4000 pop_ = nullptr;
};

const Driver& driver();

}  // namespace merge_attn_states::cuda
