// The generic kernel: any dtype of the table, any strides, any alignment, any head size.
//
// A block takes a few whole rows. Its first threads weigh a row each and leave weights and
// addresses in shared memory; after one barrier all threads walk over the rows' elements,
// neighbours on neighbouring elements: eight bytes at a time where the layout allows, else one. In
// place is safe: a row belongs to one block, its LSEs are read before the barrier by the thread
// that writes the merged one after it, and an element is read and written by one thread.
#include <algorithm>

#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

constexpr int kUnroll = kGenericUnroll;

struct GenericCall {
  Geometry geometry;
  Pair parts;
  State merged;
  RowRule rule;
  FastDivision packs_per_row;  // used where several rows share a block, which are then short
  FastDivision heads;          // used where there are fewer than 2^31 rows
  int64_t row_packs;
  int32_t rows;
  bool few_rows;
};

template <class In, class Out>
struct RowInBlock {
  Weights<typename Accumulate<In>::type> weights;
  const In* prefix;
  const In* suffix;
  Out* output;
};

// kElements > 1: the elements of a row lie side by side, in aligned packs of that many. Registers
// are left to the compiler: held to fewer, it computes each place twice.
template <class In, class Out, int kElements>
__global__ void __launch_bounds__(kGenericThreads)
    merge_generic(const __grid_constant__ GenericCall call) {
  using Acc = typename Accumulate<In>::type;
  __shared__ RowInBlock<In, Out> rows[kGenericMaxRows];
  __shared__ MergedLse<ScalarMath<Acc>, Acc> lses[kGenericMaxRows];  // each for its own thread
  const int64_t num_rows = call.geometry.num_rows();
  wait_for_previous();
  Scale scale;
  if constexpr (kIsFp8<Out>) {
    if (call.rule.output_scale != nullptr) scale = Scale(*call.rule.output_scale);
  }
  const auto stride = [](const Rows& operand) {
    return kElements > 1 ? kElements : operand.element_stride;
  };

  for (int64_t first = int64_t{blockIdx.x} * call.rows; first < num_rows;
       first += int64_t{gridDim.x} * call.rows) {
    const int64_t count = min(int64_t{call.rows}, num_rows - first);
    __syncthreads();  // the rows of the round before are done with
    const bool weighs = threadIdx.x < count;
    const int64_t mine = first + threadIdx.x;
    const auto token_of_mine = [&] {
      return call.few_rows ? int64_t{call.heads.quotient(static_cast<uint32_t>(mine))}
                           : mine / call.geometry.num_heads;
    };
    if (weighs) {
      const int64_t token = token_of_mine(), head = mine - token * call.geometry.num_heads;
      lses[threadIdx.x] = weigh_row<Acc>(call.parts, call.rule, token, head);
      rows[threadIdx.x] = {.weights = lses[threadIdx.x].weights,
                           .prefix = row_of<In>(call.parts.prefix.output, token, head),
                           .suffix = row_of<In>(call.parts.suffix.output, token, head),
                           .output = row_of<Out>(call.merged.output, token, head)};
    }
    __syncthreads();

    const int64_t packs = count * call.row_packs;
    for (int64_t base = threadIdx.x; base < packs; base += kGenericThreads * kUnroll) {
      Pack<In, kElements> prefix[kUnroll]{}, suffix[kUnroll]{};
      int32_t row[kUnroll];
      int64_t column[kUnroll];
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        const int64_t i = base + k * kGenericThreads;
        // One row alone may be longer than 32 bits count.
        row[k] = call.rows == 1 ? 0 : call.packs_per_row.quotient(static_cast<uint32_t>(i));
        column[k] = i - row[k] * call.row_packs;
        if (i >= packs) continue;
        const RowInBlock<In, Out>& from = rows[row[k]];
        const auto load = [&](const In* data, const Rows& operand) {
          return Pack<In, kElements>::load(data + column[k] * stride(operand));
        };
        if (!from.weights.skips_prefix()) prefix[k] = load(from.prefix, call.parts.prefix.output);
        if (!from.weights.skips_suffix()) suffix[k] = load(from.suffix, call.parts.suffix.output);
      }
#pragma unroll
      for (int k = 0; k < kUnroll; ++k) {
        if (base + k * kGenericThreads >= packs) break;
        const RowInBlock<In, Out>& to = rows[row[k]];
        merge_pack<In, Out, kElements>(to.weights, scale, prefix[k], suffix[k])
            .store(to.output + column[k] * stride(call.merged.output));
      }
    }
    // After the packs: in front of the barrier its logarithm would keep every thread waiting.
    if (weighs) {
      const int64_t token = token_of_mine(), head = mine - token * call.geometry.num_heads;
      store_lse(call.merged.lse, token, head, lses[threadIdx.x]);
    }
  }
}

}  // namespace

void launch_generic(const MergeCall& call, const GenericShape& shape) {
  const int64_t num_rows = call.geometry.num_rows();
  const int64_t row_packs = call.geometry.head_size / shape.pack_elements;
  const uint32_t divisor = shape.rows == 1 || row_packs == 0 ? 1 : static_cast<uint32_t>(row_packs);
  const bool few_rows = num_rows <= kMaxGridX;
  const GenericCall parameters{
      .geometry = call.geometry,
      .parts = call.parts,
      .merged = call.merged,
      .rule = call.rule,
      .packs_per_row = FastDivision(divisor),
      .heads = FastDivision(few_rows ? static_cast<uint32_t>(call.geometry.num_heads) : 1),
      .row_packs = row_packs,
      .rows = shape.rows,
      .few_rows = few_rows};
  const Grid grid{.blocks = std::min((num_rows - 1) / shape.rows + 1, kMaxGridX),
                  .threads = kGenericThreads};
  dispatch_dtypes(call.input_dtype, call.output_dtype, [&](auto in, auto out) {
    using In = typename decltype(in)::type;
    using Out = typename decltype(out)::type;
    constexpr int kWide = kGenericPackBytes / sizeof(In);
    launch(shape.pack_elements == 1 ? kernel<merge_generic<In, Out, 1>>()
                                    : kernel<merge_generic<In, Out, kWide>>(),
           grid, call, parameters);
  });
}

}  // namespace merge_attn_states::cuda
