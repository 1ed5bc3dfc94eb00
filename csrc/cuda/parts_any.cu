// The kernel that takes every call of many parts: what parts_few.cu, parts_many.cu and
// parts_each.cu leave, as many parts of any kind, any strides, mixed bases, float64.
//
// A block takes a few whole rows. Its threads read the LSEs of all their parts and leave them, with
// the address of each part's row, in shared memory; one thread a row weighs; then all threads walk
// over the rows' elements, eight at a time where the layout allows. In place is safe: a row belongs
// to one block, its LSEs are read before a barrier and the merged one is written behind it, and an
// element is read and written by one thread.
#include "parts_any.cuh"

namespace merge_attn_states::cuda {
namespace {

template <class Acc, int kElements, class Source>
__global__ void __launch_bounds__(kAnyThreads)
    merge_any(const __grid_constant__ AnyCall<Source> call) {
  constexpr int kAtOnce = SumOfParts<Acc>::kAtOnce, kInFlight = 4;
  __shared__ RowsOfBlock<Acc> rows;
  __shared__ char* out_rows[kAnyThreads];  // null: nothing is written
  const int num_parts = call.num_parts;
  wait_for_previous();
  Scale scale;
  if (call.out_scale != nullptr) scale = Scale(*call.out_scale);

  for (int64_t first = int64_t{blockIdx.x} * call.rows; first < call.num_rows;
       first += int64_t{gridDim.x} * call.rows) {
    const int count = static_cast<int>(min(int64_t{call.rows}, call.num_rows - first));
    __syncthreads();  // the rows of the round before are done with
    Acc of_sink;
    const bool wants_lse = call.out_lse.data != nullptr;
    RowCoordinates own{};
    bool is_written = false;
    if (threadIdx.x < count) {
      own = coordinates(call, first + threadIdx.x);
      is_written = call.out_index.find(own, call.out_index_is_64_bit);
      out_rows[threadIdx.x] = is_written ? static_cast<char*>(call.out.data) +
                                               call.out.offset(own) * size_of(call.out_dtype)
                                         : nullptr;
    }
    const Acc lse = rows.weigh(call, first, count, wants_lse, of_sink);

    const int64_t packs = count * call.row_packs;
    for (int64_t at = threadIdx.x; at < packs; at += kAnyThreads) {
      // One row alone may be longer than 32 bits count.
      const int of_block =
          call.rows == 1 ? 0
                         : static_cast<int>(call.packs_per_row.quotient(static_cast<uint32_t>(at)));
      const int64_t column = (at - of_block * call.row_packs) * kElements;
      char* const to = out_rows[of_block];
      if (to == nullptr) continue;
      const Acc* const mine = rows.weights + of_block * num_parts;
      const char* const* const of_parts = rows.parts + of_block * num_parts;
      const auto address = [&](int k) {
        const Part& part = call.source.part(k);
        return of_parts[k] + column * part.element_stride * size_of(part.dtype);
      };

      SumOfParts<Acc> sums[kElements];
      int seen = 0, last = 0;
      for (int begin = 0; begin < num_parts; begin += kInFlight) {
        Raw<kElements> raw[kInFlight]{};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int k = begin + j;
          if (k < num_parts && !(mine[k] < Acc(0)) && of_parts[k] != nullptr) {
            raw[j] = Raw<kElements>::load(address(k), size_of(call.source.part(k).dtype));
          }
        }
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int k = begin + j;
          if (k >= num_parts) break;
          if (k % kAtOnce == 0) {
#pragma unroll
            for (SumOfParts<Acc>& sum : sums) sum.end_sixteen();
          }
          if (mine[k] < Acc(0)) continue;
          ++seen;
          last = k;
          Acc values[kElements]{};
          unpack(raw[j], call.source.part(k).dtype, values);
#pragma unroll
          for (int i = 0; i < kElements; ++i) sums[i].add(mine[k], values[i]);
        }
      }

      char* const place = to + column * call.out_element_stride * size_of(call.out_dtype);
      const bool is_alone = seen == 1 && mine[last] == Acc(1);
      const DType of_last = call.source.part(last).dtype;
      Raw<kElements> merged{};
      if (is_alone && of_last == call.out_dtype && !scale.given()) {
        merged = Raw<kElements>::load(address(last), size_of(of_last));  // byte for byte
      } else if (seen > 0) {
        Acc values[kElements];
#pragma unroll
        for (int i = 0; i < kElements; ++i) values[i] = sums[i].value();
        if constexpr (sizeof(Acc) == sizeof(float)) {
          if (scale.given()) scale.divide(values);
        }
        merged = pack(values, call.out_dtype);
      }
      merged.store(place, size_of(call.out_dtype));
    }
    if (is_written && wants_lse) {
      static_cast<Acc*>(call.out_lse.data)[call.out_lse.offset(own)] = lse;
    }
  }
}

}  // namespace

void launch_any(const PartsCall& call, const AnyShape& shape) {
  const Grid grid{.blocks = std::min((call.num_rows() - 1) / shape.rows + 1, kMaxGridX),
                  .threads = kAnyThreads};
  with_parameters(call, shape, [&]<class Source>(const AnyCall<Source>& parameters) {
    const auto& chosen = call.acc_dtype == DType::kFloat64 ? kernel<merge_any<double, 1, Source>>()
                         : shape.elements == 1             ? kernel<merge_any<float, 1, Source>>()
                                                           : kernel<merge_any<float, 8, Source>>();
    launch(chosen, grid, call, parameters);
  });
}

}  // namespace merge_attn_states::cuda
