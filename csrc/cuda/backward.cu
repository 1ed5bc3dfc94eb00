// The kernel of a merge's gradients that takes every call; parts_each_backward.cu takes the usual
// ones.
//
// A block takes a few rows, weighs their parts as parts_any.cu does, and then gives each row to a
// warp: of each part its lanes read the values, write the output's gradient times the weight, and
// sum their products with it; then the LSEs' gradients are known.
#include "parts_any.cuh"

namespace merge_attn_states::cuda {
namespace {

constexpr int kWarps = kAnyThreads / 32;

// All lanes get the sum; in one order, whatever else runs.
template <class Acc>
__device__ Acc sum_of_warp(Acc value) {
  for (int lanes = 16; lanes > 0; lanes /= 2) {
    value += __shfl_xor_sync(0xffffffffu, value, lanes);
  }
  return value;
}

template <class Acc, int kElements, class Source>
__global__ void __launch_bounds__(kAnyThreads)
    backward_any(const __grid_constant__ AnyCall<Source> call) {
  __shared__ RowsOfBlock<Acc> rows;
  __shared__ Acc dots[kAnyWeights];
  __shared__ Acc weights_of_sinks[kAnyThreads];
  const int num_parts = call.num_parts;
  const int warp = threadIdx.x / 32, lane = threadIdx.x % 32;
  const int64_t head_size = call.row_packs * kElements;
  wait_for_previous();

  for (int64_t first = int64_t{blockIdx.x} * call.rows; first < call.num_rows;
       first += int64_t{gridDim.x} * call.rows) {
    const int count = static_cast<int>(min(int64_t{call.rows}, call.num_rows - first));
    __syncthreads();  // the rows of the round before are done with
    Acc of_sink;
    rows.weigh(call, first, count, false, of_sink);
    if (threadIdx.x < count) weights_of_sinks[threadIdx.x] = of_sink;
    __syncthreads();

    for (int of_block = warp; of_block < count; of_block += kWarps) {
      const int64_t number = first + of_block;
      const RowCoordinates row = coordinates(call, number);
      const Acc* const weights = rows.weights + of_block * num_parts;
      const char* const* const parts = rows.parts + of_block * num_parts;
      const char* const gradient =
          static_cast<const char*>(call.out.data) + call.out.offset(row) * size_of(call.out_dtype);
      const Acc of_lse = call.out_lse.data == nullptr
                             ? Acc(0)
                             : static_cast<const Acc*>(call.out_lse.data)[call.out_lse.offset(row)];
      const auto load = [&](const char* from, int64_t column, int64_t stride, DType dtype,
                            Acc(&values)[kElements]) {
        unpack(Raw<kElements>::load(from + column * stride * size_of(dtype), size_of(dtype)), dtype,
               values);
      };

      Acc mean{};
      for (int k = 0; k < num_parts; ++k) {
        const bool is_absent = parts[k] == nullptr;
        const Acc weight = is_absent ? Acc(0) : weights[k];
        const Part& part = call.source.part(k);
        char* const to = call.gradients.outputs == nullptr
                             ? nullptr
                             : static_cast<char*>(call.gradients.outputs) +
                                   (k * call.num_rows + number) * head_size *
                                       size_of(call.gradients.outputs_dtype);
        Acc dot{};
        for (int64_t pack_number = lane; pack_number < call.row_packs; pack_number += 32) {
          const int64_t column = pack_number * kElements;
          Acc values[kElements]{}, of_values[kElements]{};
          if (!is_absent) {
            load(parts[k], column, part.element_stride, part.dtype, values);
            load(gradient, column, call.out_element_stride, call.out_dtype, of_values);
          }
#pragma unroll
          for (int i = 0; i < kElements; ++i) {
            dot += values[i] * of_values[i];
            values[i] = is_absent ? Acc(0) : weight * of_values[i];
          }
          if (to != nullptr) {
            pack(values, call.gradients.outputs_dtype)
                .store(to + column * size_of(call.gradients.outputs_dtype),
                       size_of(call.gradients.outputs_dtype));
          }
        }
        dot = sum_of_warp(dot);
        if (!is_absent) mean += weight * dot;
        if (lane == 0) dots[of_block * num_parts + k] = dot;
      }
      __syncwarp();
      for (int k = lane; call.gradients.lses != nullptr && k < num_parts; k += 32) {
        const bool is_absent = parts[k] == nullptr;
        static_cast<Acc*>(call.gradients.lses)[k * call.num_rows + number] =
            is_absent ? Acc(0)
                      : lse_gradient(call.source.part(k).base, call.rule.out_base, weights[k],
                                     dots[of_block * num_parts + k], mean, of_lse);
      }
      if (lane == 0 && call.gradients.sink != nullptr) {
        const Acc weight = weights_of_sinks[of_block];
        static_cast<Acc*>(call.gradients.sink)[number] =
            weight < Acc(0) ? Acc(0)
                            : lse_gradient(call.rule.out_base, call.rule.out_base, weight, Acc(0),
                                           mean, of_lse);
      }
    }
  }
}

}  // namespace

void launch_backward(const PartsCall& call, const AnyShape& shape) {
  const Grid grid{.blocks = std::min((call.num_rows() - 1) / shape.rows + 1, kMaxGridX),
                  .threads = kAnyThreads};
  with_parameters(call, shape, [&]<class Source>(const AnyCall<Source>& parameters) {
    const auto& chosen =
        call.acc_dtype == DType::kFloat64 ? kernel<backward_any<double, 1, Source>>()
        : shape.elements == 1             ? kernel<backward_any<float, 1, Source>>()
                                          : kernel<backward_any<float, kBackwardPack, Source>>();
    launch(chosen, grid, call, parameters);
  });
}

}  // namespace merge_attn_states::cuda
