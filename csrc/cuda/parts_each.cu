// The kernel of few parts, each with a layout of its own: masks, indices, four row dimensions, a
// float32 state beside 16-bit blocks. The steps of a ring are its usual call.
//
// As in merge_few (parts_few.cu) each thread reads its row's LSEs and some packs of every part,
// weighs for itself, and stores as many. In place is safe: a row belongs to one warp or one block,
// its LSEs are read in front of a barrier and the merged one is written behind it, and an element
// is read and written by one thread.
#include "parts_each.cuh"

namespace merge_attn_states::cuda {
namespace {

// Behind an index comes a second trip to memory: there many threads count for more than registers,
// as long as the parts fit them.
template <class First, int kMost, bool kSelects>
constexpr int blocks_a_multiprocessor() {
  return kSelects && kMost <= 4 && sizeof(First) == 2 ? 1024 / kEachThreads : 1;
}

template <class First, class Rest, int kMost, bool kSelects>
__global__ void __launch_bounds__(kEachThreads, (blocks_a_multiprocessor<First, kMost, kSelects>()))
    merge_each(const __grid_constant__ EachCall<kMost> call) {
  using Row = EachRow<First, Rest, kMost, kSelects>;
  constexpr int kElements = Row::kElements;
  const uint32_t of_block = call.lanes.quotient(threadIdx.x);
  const uint32_t lane = threadIdx.x - of_block * call.lanes.divisor;
  const uint32_t number = blockIdx.x * call.rows + of_block;
  if (of_block >= call.rows || number >= call.num_rows) return;
  const ShortRow row = short_row(call, number);
  wait_for_previous();
  const auto places = Row::find(call, row);
  const bool writes_by_index = kSelects && call.writes_by_index;
  if (writes_by_index && !places.has[0]) return;
  const ShortRow own = writes_by_index ? places.of[0] : row;
  Row parts;
  parts.load(call, places, lane);
  const bool has_sink = call.sink.data != nullptr;
  float sink{}, of_sink;
  if (has_sink) {
    sink = load_element<float>(call.sink.data, call.sink_dtype, offset_of(call, call.sink, row));
  }
  if (call.needs_barrier) {
    __syncthreads();
  } else {
    __syncwarp();
  }
  const auto weighed = parts.weigh(call, has_sink ? &sink : nullptr, of_sink);
  const int taken = parts.taken();

  float values[Row::kPacks][kElements];
  if (taken == kSummed) parts.sum(values);
  const auto store_as = [&]<class Out>(TypeTag<Out>) {
    Out* const to = static_cast<Out*>(call.out.data) + offset_of(call, call.out, own);
#pragma unroll
    for (int i = 0; i < Row::kPacks; ++i) {
      using Merged = Pack<Out, kElements>;
      Merged merged{};
      if (taken == kSummed) merged = Merged::pack(values[i]);
      if (taken >= 0) {
        for_each_part<kMost>([&](auto k) {
          if (k != taken) return;
          if constexpr (std::is_same_v<Out, typename Row::template Of<k>>) {
            merged = parts.pack(k, i);  // byte for byte
          } else {
            parts.pack(k, i).unpack(values[i]);
            merged = Merged::pack(values[i]);
          }
        });
      }
      if (Row::has_pack(call, lane, i)) merged.store(to + Row::column(call, lane, i));
    }
  };
  if (call.out_dtype == DType::kFloat32) {
    store_as(TypeTag<float>{});
  } else if (call.out_dtype == DType::kFloat16) {
    store_as(TypeTag<Half>{});
  } else {
    store_as(TypeTag<BFloat16>{});
  }
  if (lane == 0 && call.out_lse.data != nullptr) {
    store_global(static_cast<float*>(call.out_lse.data) + offset_of(call, call.out_lse, own),
                 weighed.lse());
  }
}

}  // namespace

void launch_each(const PartsCall& call, const EachShape& shape) {
  const Grid grid{.blocks = (call.num_rows() - 1) / shape.rows + 1, .threads = kEachThreads};
  with_room_for<kEachParts>(call.num_parts, [&]<int kMost>() {
    const auto launch_of = [&]<class First, class Rest>(TypeTag<First>, TypeTag<Rest>) {
      const auto& each = shape.selects ? kernel<merge_each<First, Rest, kMost, true>>()
                                       : kernel<merge_each<First, Rest, kMost, false>>();
      launch(each, grid, call, each_call<kMost>(call, shape));
    };
    dispatch_floats(call.dtype_of_others(), [&](auto rest) {
      if (call.part(0).dtype == DType::kFloat32) return launch_of(TypeTag<float>{}, rest);
      launch_of(rest, rest);
    });
  });
}

}  // namespace merge_attn_states::cuda
