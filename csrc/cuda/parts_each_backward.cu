// The kernel of the gradients of few parts that have one dtype: some lanes of a warp take a row,
// read everything once, and weigh for themselves as in parts_each.cu. Of each part they write the
// output's gradient times the weight, and sum the products of its values with that gradient; then
// the LSEs' gradients are known.
#include "parts_each.cuh"

namespace merge_attn_states::cuda {
namespace {

template <class T, int kMost, bool kSelects>
__global__ void __launch_bounds__(kEachThreads)
    backward_each(const __grid_constant__ EachCall<kMost> call) {
  using Row = EachRow<T, T, kMost, kSelects>;
  constexpr int kElements = Row::kElements, kPacks = Row::kPacks;
  const uint32_t of_block = call.lanes.quotient(threadIdx.x);
  const uint32_t lane = threadIdx.x - of_block * call.lanes.divisor;
  const uint32_t number = blockIdx.x * call.rows + of_block;
  const bool exists = number < call.num_rows;
  wait_for_previous();

  Row parts;
  Pack<T, kElements> of_out[kPacks]{};
  float sink{}, weight_of_sink{}, of_lse{};
  bool is_there[kMost]{};
  if (exists) {
    const ShortRow row = short_row(call, number);
    parts.load(call, Row::find(call, row), lane);
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!Row::has_pack(call, lane, i)) break;
      of_out[i] =
          Pack<T, kElements>::load(static_cast<const T*>(call.out.data) +
                                   (offset_of(call, call.out, row) + Row::column(call, lane, i)));
    }
    if (call.out_lse.data != nullptr) {
      of_lse = load_global(static_cast<const float*>(call.out_lse.data) +
                           offset_of(call, call.out_lse, row));
    }
    const bool has_sink = call.sink.data != nullptr;
    if (has_sink) {
      sink = load_element<float>(call.sink.data, call.sink_dtype, offset_of(call, call.sink, row));
    }
#pragma unroll
    for (int k = 0; k < kMost; ++k) is_there[k] = !isinf(parts.weights[k]);
    parts.weigh(call, has_sink ? &sink : nullptr, weight_of_sink);
  }

  float gradients[kPacks][kElements], dots[kMost]{}, mean = 0.0f;
#pragma unroll
  for (int i = 0; i < kPacks; ++i) {
    of_out[i].unpack(gradients[i]);
    for_each_part<kMost>([&](auto k) {
      if (!is_there[k] || !Row::has_pack(call, lane, i)) return;
      float values[kElements];
      parts.pack(k, i).unpack(values);
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        dots[k] = add_product(dots[k], values[j], gradients[i][j]);
      }
    });
  }
  // Rows begin at a multiple of their lanes, so that an exchange stays within one.
  for (int distance = call.lanes.divisor / 2; distance > 0; distance /= 2) {
#pragma unroll
    for (int k = 0; k < kMost; ++k) dots[k] += __shfl_xor_sync(0xffffffffu, dots[k], distance);
  }
  if (!exists) return;
  const uint64_t of_row = uint64_t{number} * call.head_size;
  const uint64_t of_part = uint64_t{call.num_rows} * call.head_size;
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    if (is_there[k]) mean += parts.weights[k] * dots[k];
    if (k >= call.num_parts || call.gradients.outputs == nullptr) continue;
#pragma unroll
    for (int i = 0; i < kPacks; ++i) {
      if (!Row::has_pack(call, lane, i)) break;
      float values[kElements];
#pragma unroll
      for (int j = 0; j < kElements; ++j) {
        values[j] = is_there[k] ? parts.weights[k] * gradients[i][j] : 0.0f;
      }
      Pack<T, kElements>::pack(values).store(static_cast<T*>(call.gradients.outputs) +
                                             (k * of_part + of_row + Row::column(call, lane, i)));
    }
  }
  const LseRule& rule = call.rule;
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    if (k >= call.num_parts || lane != k % call.lanes.divisor || call.gradients.lses == nullptr)
      continue;
    static_cast<float*>(call.gradients.lses)[uint64_t{call.num_rows} * k + number] =
        is_there[k] ? lse_gradient(call.parts[k].base, rule.out_base, parts.weights[k], dots[k],
                                   mean, of_lse)
                    : 0.0f;
  }
  if (lane == 0 && call.gradients.sink != nullptr) {
    const float weight = isinf(sink) ? kSkip : weight_of_sink;
    static_cast<float*>(call.gradients.sink)[number] =
        weight < 0.0f ? 0.0f
                      : lse_gradient(rule.out_base, rule.out_base, weight, 0.0f, mean, of_lse);
  }
}

}  // namespace

void launch_each_backward(const PartsCall& call, const EachShape& shape) {
  const Grid grid{.blocks = (call.num_rows() - 1) / shape.rows + 1, .threads = kEachThreads};
  with_room_for<kEachParts>(call.num_parts, [&]<int kMost>() {
    dispatch_floats(call.out_dtype, [&](auto tag) {
      using T = typename decltype(tag)::type;
      const auto& each = shape.selects ? kernel<backward_each<T, kMost, true>>()
                                       : kernel<backward_each<T, kMost, false>>();
      launch(each, grid, call, each_call<kMost>(call, shape));
    });
  });
}

}  // namespace merge_attn_states::cuda
