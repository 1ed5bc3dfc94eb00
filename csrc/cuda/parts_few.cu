// The kernel of up to 16 parts that lie alike, listed among the parameters: every thread reads its
// row's LSEs and one pack of each part, weighs for itself, and stores a pack; further threads, one
// a row, merge the LSEs.
//
// In place is safe: a row belongs to one block, a barrier stands between the reads of its LSEs and
// the store of the merged one, and a pack of the parts is read by the thread that writes it.
#include "parts_alike.cuh"
#include "parts_row.cuh"

namespace merge_attn_states::cuda {
namespace {

struct FewParts {
  AlikeRows rows;
  ThreadDivision packs_per_row;
  uint32_t rows_per_block;
  uint32_t value_threads;  // threads from there on merge an LSE each
  int32_t num_parts;
  bool replaces_an_lse;
  LseRule rule;
  Sink sink;
  void* out;
  float* out_lse;  // null: not asked for
  const float* lses[kFewParts];
  const void* parts[kFewParts];
};

static_assert(ThreadDivision::is_exact(kMaxFewThreads));

// In place of a part that there is not: with weight 0 it changes no sum, not even -0.
template <class T, int kElements>
__device__ Pack<T, kElements> minus_zeros() {
  typename Pack<T, kElements>::Acc values[kElements];
#pragma unroll
  for (auto& value : values) value = -0.0f;
  return Pack<T, kElements>::pack(values);
}

// Makes a row's empty parts, whose weights are negative, and the places without one such that they
// change no sum: weight 0, and leave_out(k) is to make minus_zeros of the values. Returns the part
// that is all of the row and is to be taken byte for byte, or kSummed or kNoPart.
template <int kMost, class LeaveOut>
__device__ int leave_out_empty(float (&weights)[kMost], int num_parts, LeaveOut leave_out) {
  int taken = kNoPart;
  for_each_part<kMost>([&](auto k) {
    if (k >= num_parts) {
      weights[k] = 0.0f;
    } else if (weights[k] < 0.0f) {
      weights[k] = 0.0f;
      leave_out(k);
    } else {
      taken = taken == kNoPart && weights[k] == 1.0f ? int{k} : kSummed;
    }
  });
  return taken;
}

// Sums all parts by their weights; unpack(k, values) gives the elements of part k.
template <int kMost, int kElements, class Unpack>
__device__ void sum_parts(const float (&weights)[kMost], Unpack unpack,
                          float (&values)[kElements]) {
  static_assert(kMost <= SumOfParts<float>::kAtOnce, "more are summed sixteen by sixteen");
  for_each_part<kMost>([&](auto k) {
    float of_part[kElements];
    unpack(k, of_part);
#pragma unroll
    for (int i = 0; i < kElements; ++i) {
      values[i] = k == 0 ? weights[0] * of_part[i] : add_product(values[i], weights[k], of_part[i]);
    }
  });
}

// kMost >= num_parts, so that arrays stay in registers; what is beyond the parts is empty.
template <class T, int kMost, bool kIsFull, bool kHasSink>
__global__ void __launch_bounds__(kMaxFewThreads) merge_few(const __grid_constant__ FewParts call) {
  using PackT = Pack<T, kElements<T>>;
  const int num_parts = kIsFull ? kMost : call.num_parts;
  const bool merges_lse = threadIdx.x >= call.value_threads;
  const uint32_t of_values = call.packs_per_row.quotient(threadIdx.x);
  const uint32_t of_block = merges_lse ? threadIdx.x - call.value_threads : of_values;
  const uint32_t column = threadIdx.x - of_values * call.packs_per_row.divisor;
  const uint32_t number = blockIdx.x * call.rows_per_block + of_block;
  if (of_block >= call.rows_per_block || number >= call.rows.num_rows) return;
  const AlikeRow row(call.rows, number);
  wait_for_previous();

  float weights[kMost], weight_of_sink, sink{};
  PackT packs[kMost];
  const uint32_t lse_offset = row.offset(call.rows.of_lses);
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    weights[k] = -INFINITY;
    if (k < num_parts) weights[k] = load_global(call.lses[k] + lse_offset);
  }
  if (!merges_lse) {
    const uint32_t offset = row.offset(call.rows.of_parts);
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      packs[k] = minus_zeros<T, kElements<T>>();
      if (k < num_parts) packs[k] = PackT::load(pack_at<T>(call.parts[k], offset, column));
    }
  }
  if constexpr (kHasSink) sink = call.sink.load(row.offset(call.rows.of_sink));
  if (call.replaces_an_lse) __syncthreads();

  // Most rows have no empty part, and then nothing is asked of each.
  float farthest = 0.0f;
#pragma unroll
  for (int k = 0; k < kMost; ++k) {
    if (k < num_parts) farthest = fmaxf(farthest, fabsf(weights[k]));
  }
  if constexpr (kHasSink) farthest = fmaxf(farthest, fabsf(sink));
  int taken = kSummed;
  float lse{};
  const auto weigh = [&](auto may_be_empty) {
    const auto weighed = weigh_parts<ScalarMath<float>, float, float, may_be_empty>(
        call.rule, kMost, [&](int k) { return weights[k]; }, kHasSink ? &sink : nullptr,
        [&](int k) -> float& { return k < kMost ? weights[k] : weight_of_sink; });
    if (merges_lse) lse = weighed.lse();
  };
  if (farthest < INFINITY && num_parts > 1) {
    weigh(std::false_type{});
  } else {
    weigh(std::true_type{});
    taken = leave_out_empty(weights, num_parts,
                            [&](int k) { packs[k] = minus_zeros<T, kElements<T>>(); });
  }
  if (merges_lse) {
    store_global(call.out_lse + row.offset(call.rows.of_out_lse), lse);
    return;
  }
  PackT merged{};
  if (taken != kNoPart) {
    float values[kElements<T>];
    sum_parts(
        weights, [&](int k, auto& of_part) { packs[k].unpack(of_part); }, values);
    merged = PackT::pack(values);
  }
  if (taken >= 0) {
#pragma unroll
    for (int k = 0; k < kMost; ++k) {
      if (k == taken) merged = packs[k];  // byte for byte
    }
  }
  merged.store(pack_at<T>(call.out, row.offset(call.rows.of_out), column));
}

}  // namespace

void launch_few(const PartsCall& call, const AlikeShape& shape) {
  FewParts parameters{.rows = alike_rows(call),
                      .packs_per_row = ThreadDivision(shape.packs_per_row),
                      .rows_per_block = static_cast<uint32_t>(shape.rows),
                      .value_threads = static_cast<uint32_t>(shape.threads),
                      .num_parts = call.num_parts,
                      .replaces_an_lse = call.replaces_an_lse(),
                      .rule = call.lse_rule(),
                      .sink = {call.sink.data, call.sink_dtype},
                      .out = call.out.data,
                      .out_lse = static_cast<float*>(call.out_lse.data),
                      .lses = {},
                      .parts = {}};
  for (int k = 0; k < call.num_parts; ++k) {
    parameters.lses[k] = static_cast<const float*>(call.lse_data(k));
    parameters.parts[k] = call.output_data(k);
  }
  const Grid grid{.blocks = (call.num_rows() - 1) / shape.rows + 1,
                  .threads = shape.threads + shape.lse_threads};
  dispatch_floats(call.out_dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    with_room_for<kFewParts>(call.num_parts, [&]<int kMost>() {
      const auto& few = call.sink.data != nullptr ? kernel<merge_few<T, kMost, false, true>>()
                        : call.num_parts == kMost ? kernel<merge_few<T, kMost, true, false>>()
                                                  : kernel<merge_few<T, kMost, false, false>>();
      launch(few, grid, call, parameters);
    });
  });
}

}  // namespace merge_attn_states::cuda
