// Chooses the instruction set once and splits the tiles over threads.
#include <algorithm>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../devices.h"
#include "kernels.h"
#include "parallel.h"

#if MERGE_ATTN_STATES_HAS_V3
#include <cpuid.h>
#endif

namespace merge_attn_states::cpu {
namespace {

struct Build {
  const char* name;
  void (*merge_tiles)(const MergeCall&, int64_t, int64_t);
};

#if MERGE_ATTN_STATES_HAS_V3
bool has_v3() {
  unsigned eax, ebx, ecx = 0, edx;
  // F16C has no name in older compilers' __builtin_cpu_supports: bit 29 of leaf 1, register ecx.
  return __builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma") &&
         __builtin_cpu_supports("bmi") && __builtin_cpu_supports("bmi2") &&
         __get_cpuid(1, &eax, &ebx, &ecx, &edx) && (ecx >> 29 & 1);
}
#endif

// MERGE_ATTN_STATES_CPU_KERNEL names a build, to compare the two; else the widest that runs here.
const Build& build() {
  static const Build chosen = [] {
    const Build baseline = {"baseline", baseline::merge_tiles};
    Build widest = baseline;
#if MERGE_ATTN_STATES_HAS_V3
    if (has_v3()) widest = {"x86-64-v3", v3::merge_tiles};
#endif
    const char* wish = std::getenv("MERGE_ATTN_STATES_CPU_KERNEL");
    for (const Build& candidate : {widest, baseline}) {
      if (!wish || !*wish || std::strcmp(wish, candidate.name) == 0) return candidate;
    }
    throw Unavailable(std::string("MERGE_ATTN_STATES_CPU_KERNEL: expected ") + widest.name +
                      " or baseline, got " + wish);
  }();
  return chosen;
}

// Elements for which a second thread pays: PyTorch's own grain for elementwise kernels.
constexpr int64_t kElementsPerThread = 32768;

}  // namespace

Selection choose() { return selection("cpu", build().name); }

void run(const MergeCall& call) {
  const int64_t count = tiles(call.geometry.num_tokens, kTileTokens) *
                        tiles(call.geometry.num_heads, tile_heads(call));
  const int64_t elements = std::min(call.geometry.num_tokens, kTileTokens) *
                           std::min(call.geometry.num_heads, tile_heads(call)) *
                           std::max<int64_t>(1, call.geometry.head_size);
  // Chosen here, where it may throw: a thread of the pool may not.
  const struct {
    const MergeCall& call;
    void (*merge_tiles)(const MergeCall&, int64_t, int64_t);
  } work{call, build().merge_tiles};
  parallel_for(
      count, std::max<int64_t>(1, kElementsPerThread / elements),
      [](const void* context, int64_t begin, int64_t end) {
        const auto& mine = *static_cast<const decltype(work)*>(context);
        mine.merge_tiles(mine.call, begin, end);
      },
      &work);
}

}  // namespace merge_attn_states::cpu
