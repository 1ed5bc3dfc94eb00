// Chooses the instruction set once and splits the tiles over threads.
#include <algorithm>
#include <array>
#include <cstdlib>
#include <cstring>
#include <iterator>
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
  void (*merge_tiles)(const MergeCall&, bool, int64_t, int64_t);
  void (*merge_parts)(const PartsCall&, const PartsTiles&, int64_t, int64_t);
  void (*backward_parts)(const PartsCall&, const PartsTiles&, int64_t, int64_t);
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
    const Build baseline = {"baseline", baseline::merge_tiles, baseline::merge_parts,
                            baseline::backward_parts};
    Build widest = baseline;
#if MERGE_ATTN_STATES_HAS_V3
    if (has_v3()) widest = {"x86-64-v3", v3::merge_tiles, v3::merge_parts, v3::backward_parts};
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

// Calls merge(begin, end) for pieces of [0, count), from several threads where that pays. `merge`
// is made here, where it may throw: a thread of the pool may not.
template <class Merge>
void merge_in_parallel(int64_t count, int64_t elements, const Merge& merge) {
  parallel_for(
      count, std::max<int64_t>(1, kElementsPerThread / std::max<int64_t>(1, elements)),
      [](const void* context, int64_t begin, int64_t end) {
        (*static_cast<const Merge*>(context))(begin, end);
      },
      &merge);
}

// Whether the rows of a result would not stay in the caches anyway, and each fills whole lines.
template <class Strides>
bool passes_caches(const void* data, const Strides& strides, int64_t num_rows, int64_t head_size,
                   DType dtype) {
  constexpr int64_t kLine = 64;
  const int64_t size = size_of(dtype);
  const auto fills_lines = [=](int64_t elements) { return elements * size % kLine == 0; };
  return num_rows * head_size * size >= kStreamedBytes &&
         reinterpret_cast<uintptr_t>(data) % kLine == 0 && fills_lines(head_size) &&
         std::all_of(std::begin(strides), std::end(strides), fills_lines);
}

// Whether rows of the result may go past the caches, where nothing has brought them (in place).
bool streams(const MergeCall& call) {
  const Rows& out = call.merged.output;
  const auto& [prefix, suffix] = call.parts;
  return out.element_stride == 1 && out.data != prefix.output.data &&
         out.data != suffix.output.data &&
         passes_caches(out.data, std::array{out.token_stride, out.head_stride},
                       call.geometry.num_rows(), call.geometry.head_size, call.output_dtype);
}

bool streams(const PartsCall& call) {
  const bool is_in_place = std::any_of(call.parts.begin(), call.parts.end(), [&](const Part& part) {
    return part.output.data == call.out.data;
  });
  return call.out_element_stride == 1 && call.out_index.data == nullptr && !call.is_stack &&
         !is_in_place &&
         passes_caches(call.out.data, call.out.strides, call.num_rows(), call.head_size,
                       call.out_dtype);
}

PartsTiles parts_tiles(const PartsCall& call) {
  PartsTiles result{.dims = {0, kMaxRowDims - 1}, .streams = streams(call)};
  int &along = result.dims.along, &across = result.dims.across;
  const auto step = [&](int dim) { return std::abs(call.part(0).lse.strides[dim]); };
  const auto is_closer = [&](int dim) {
    return call.sizes[dim] > 1 && (call.sizes[along] == 1 || step(dim) <= step(along));
  };
  for (int dim = 0; dim < kMaxRowDims; ++dim) along = is_closer(dim) ? dim : along;
  across = along == kMaxRowDims - 1 ? 0 : kMaxRowDims - 1;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    across = dim != along && call.sizes[dim] > 1 ? dim : across;
  }
  const int64_t most = call.sizes[along] > kTileTokens ? kTileHeads : kTileHeadsOfFewTokens;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    result.extents[dim] = dim == along ? kTileTokens
                          : dim == across
                              ? std::clamp<int64_t>(kTileParts / (call.num_parts + 1), 1, most)
                              : 1;
    result.counts[dim] = tiles(call.sizes[dim], result.extents[dim]);
  }
  return result;
}

}  // namespace

Selection choose() { return selection("cpu", build().name); }

void run(const MergeCall& call) {
  const int64_t count = tiles(call.geometry.num_tokens, kTileTokens) *
                        tiles(call.geometry.num_heads, tile_heads(call));
  const int64_t elements = std::min(call.geometry.num_tokens, kTileTokens) *
                           std::min(call.geometry.num_heads, tile_heads(call)) *
                           call.geometry.head_size;
  const auto merge = build().merge_tiles;
  const bool past_caches = streams(call);
  merge_in_parallel(count, elements,
                    [&](int64_t begin, int64_t end) { merge(call, past_caches, begin, end); });
}

static void run_tiles(const PartsCall& call,
                      void (*tiles)(const PartsCall&, const PartsTiles&, int64_t, int64_t)) {
  const PartsTiles cut = parts_tiles(call);
  int64_t count = 1, elements = call.head_size * call.num_parts / 2;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    count *= cut.counts[dim];
    elements *= std::min(call.sizes[dim], cut.extents[dim]);
  }
  merge_in_parallel(count, elements, [&call, &cut, tiles](int64_t begin, int64_t end) {
    tiles(call, cut, begin, end);
  });
}

void run(const PartsCall& call) {
  if (const auto pair = as_pair(call)) return run(*pair);
  run_tiles(call, build().merge_parts);
}

void run_backward(const PartsCall& call) { run_tiles(call, build().backward_parts); }

}  // namespace merge_attn_states::cpu
