// The generic kernel: any dtype of the table, any strides, any alignment, any head size.
//
// A block takes a few whole rows. Its first threads compute each row's weights and base addresses
// into shared memory; after one barrier all threads walk over the rows' elements, neighbours on
// neighbouring elements. In place is safe: a row belongs to one block, its LSEs are read before the
// barrier by the thread that writes the merged one, and an element is read and written by one
// thread.
#include "../rows.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"

namespace merge_attn_states::cuda {
namespace {

constexpr int kUnroll = 4;  // elements of a thread whose loads are in flight together

template <class In, class Out>
struct RowInBlock {
  using Acc = typename Accumulate<In>::type;
  Weights<Acc> weights;
  const In* prefix;
  const In* suffix;
  Out* output;
};

template <class In, class Out>
__device__ RowInBlock<In, Out> begin_row(const MergeArgs& args, int64_t row) {
  const int64_t token = row / args.num_heads, head = row - token * args.num_heads;
  return {.weights = weigh_row<typename Accumulate<In>::type>(args, token, head),
          .prefix = row_of<In>(args.prefix_output, token, head),
          .suffix = row_of<In>(args.suffix_output, token, head),
          .output = row_of<Out>(args.output, token, head)};
}

template <class In, class Out>
__device__ Out merge_element(const MergeArgs& args, Weights<typename Accumulate<In>::type> weights,
                             float scale, In prefix, In suffix) {
  if (weights.skips_prefix() && weights.skips_suffix()) return Element<Out>::store(0);
  const bool blends = !weights.skips_prefix() && !weights.skips_suffix();
  const In taken = weights.skips_prefix() ? suffix : prefix;
  if constexpr (std::is_same_v<In, Out>) {
    if (!blends && args.copies_bytes()) return taken;
  }
  auto value = Element<In>::load(taken);
  if (blends) value = blend(weights, value, Element<In>::load(suffix));
  if constexpr (kIsFp8<Out>) {
    if (args.output_scale != nullptr) value = value / scale;
  }
  return Element<Out>::store(value);
}

template <class In, class Out>
__global__ void __launch_bounds__(kGenericThreads)
    merge_generic(const __grid_constant__ MergeArgs args,
                  const __grid_constant__ FastDivision head_size, int32_t rows_per_block) {
  __shared__ RowInBlock<In, Out> rows[kGenericMaxRows];
  const int64_t num_rows = args.num_tokens * args.num_heads;
  const float scale = args.output_scale != nullptr ? *args.output_scale : 1.0f;

  for (int64_t first = int64_t{blockIdx.x} * rows_per_block; first < num_rows;
       first += int64_t{gridDim.x} * rows_per_block) {
    const int64_t count = min(int64_t{rows_per_block}, num_rows - first);
    __syncthreads();  // the rows of the round before are done with
    if (threadIdx.x < count) rows[threadIdx.x] = begin_row<In, Out>(args, first + threadIdx.x);
    __syncthreads();

    const int64_t elements = count * args.head_size;
    for (int64_t base = threadIdx.x; base < elements; base += kGenericThreads * kUnroll) {
      In prefix[kUnroll]{}, suffix[kUnroll]{};
      int32_t row[kUnroll];
      int64_t column[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t i = base + k * kGenericThreads;
        // One row alone may be longer than 32 bits count; several are short.
        row[k] = rows_per_block == 1 ? 0 : head_size.quotient(static_cast<uint32_t>(i));
        column[k] = i - row[k] * args.head_size;
        if (i >= elements) continue;
        const auto& from = rows[row[k]];
        if (!from.weights.skips_prefix()) {
          prefix[k] = from.prefix[column[k] * args.prefix_output.element_stride];
        }
        if (!from.weights.skips_suffix()) {
          suffix[k] = from.suffix[column[k] * args.suffix_output.element_stride];
        }
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (base + k * kGenericThreads >= elements) break;
        const auto& to = rows[row[k]];
        to.output[column[k] * args.output.element_stride] =
            merge_element<In, Out>(args, to.weights, scale, prefix[k], suffix[k]);
      }
    }
  }
}

}  // namespace

void launch_generic(const MergeArgs& args, int rows) {
  const int64_t num_rows = args.num_tokens * args.num_heads;
  // The quotient is used only where several rows share a block, which keeps head_size small.
  const FastDivision head_size(
      rows == 1 ? 1 : static_cast<uint32_t>(std::max<int64_t>(1, args.head_size)));
  const Grid grid{.blocks = std::min((num_rows - 1) / rows + 1, kMaxGridX),
                  .threads = kGenericThreads,
                  .overlaps_previous = false};
  dispatch_dtypes(args.input_dtype, args.output_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    launch(merge_generic<In, Out>, grid, args, args, head_size, int32_t{rows});
  });
}

}  // namespace merge_attn_states::cuda
