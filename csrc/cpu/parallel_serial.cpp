// Threads of a build without libtorch: none.
#include "parallel.h"

namespace merge_attn_states::cpu {

void parallel_for(int64_t count, int64_t, void (*body)(const void*, int64_t, int64_t),
                  const void* context) {
  body(context, 0, count);
}

}  // namespace merge_attn_states::cpu
