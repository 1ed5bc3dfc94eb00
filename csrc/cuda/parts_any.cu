// The kernel of many parts of any kind: dtypes that differ, any strides, masks, indices, mixed
// bases, FP8, float64.
//
// A block takes a few whole rows. Its threads read the LSEs of all their parts and leave them, with
// the address of each part's row, in shared memory; one thread a row weighs; then all threads walk
// over the rows' elements, eight at a time where the layout allows. In place is safe: a row belongs
// to one block, its LSEs are read before a barrier and the merged one is written behind it, and an
// element is read and written by one thread.
#include <algorithm>

#include "families.h"
#include "fast_division.h"
#include "launch.h"
#include "pack.cuh"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

// Parts that each have a layout of their own.
template <int kMost>
struct Table {
  Part parts[kMost];

  __device__ const Part& part(int k) const { return parts[k]; }
  __device__ const void* output(int k) const { return parts[k].output.data; }
  __device__ const void* lse(int k) const { return parts[k].lse.data; }
};

// Parts that differ in their addresses alone.
struct AlikeTable {
  Part first;
  const void* outputs[kMaxAlikeParts];
  const void* lses[kMaxAlikeParts];

  __device__ const Part& part(int) const { return first; }
  __device__ const void* output(int k) const { return outputs[k]; }
  __device__ const void* lse(int k) const { return lses[k]; }
};

template <class Source>
struct AnyCall {
  int64_t sizes[kMaxRowDims];
  FastDivision divisors[kMaxRowDims];  // of the sizes, used where there are fewer than 2^31 rows
  FastDivision packs_per_row;          // used where several rows share a block
  FastDivision parts;
  int64_t num_rows;
  int64_t row_packs;
  int32_t rows;  // of a block
  int32_t num_parts;
  LseRule rule;
  bool few_rows, mixes_bases, invert_empty, out_index_is_64_bit;
  DType out_dtype, sink_dtype;
  PerRow out, out_lse, sink;
  int64_t out_element_stride;
  RowIndex out_index;
  const float* out_scale;
  Source source;
};
static_assert(sizeof(AnyCall<Table<kMaxParts>>) <= 32764, "more than a kernel's parameters hold");
static_assert(sizeof(AnyCall<AlikeTable>) <= 32764, "more than a kernel's parameters hold");

template <class Call>
__device__ RowCoordinates coordinates(const Call& call, int64_t row) {
  RowCoordinates result{};
  for (int dim = kMaxRowDims - 1; dim > 0; --dim) {
    if (call.sizes[dim] == 1) continue;
    const int64_t above = call.few_rows
                              ? int64_t{call.divisors[dim].quotient(static_cast<uint32_t>(row))}
                              : row / call.sizes[dim];
    result.of[dim] = row - above * call.sizes[dim];
    row = above;
  }
  result.of[0] = row;
  return result;
}

// As it is stored, -inf where the part is absent or declared empty; `row` becomes the part's own.
template <class Acc, class Call>
__device__ Acc load_lse(const Call& call, int k, RowCoordinates& row, bool& is_absent) {
  const Part& part = call.source.part(k);
  is_absent = !part.index.find(row, part.index_is_64_bit);
  if (is_absent) return -INFINITY;
  if (part.empty.data != nullptr) {
    const bool marked = static_cast<const uint8_t*>(part.empty.data)[part.empty.offset(row)] != 0;
    if (marked != call.invert_empty) return -INFINITY;
  }
  return static_cast<const Acc*>(call.source.lse(k))[part.lse.offset(row)];
}

template <class Acc, class Call>
__device__ Acc load_sink(const Call& call, const RowCoordinates& row) {
  const int64_t offset = call.sink.offset(row);
  if constexpr (sizeof(Acc) == sizeof(double)) {
    return static_cast<const double*>(call.sink.data)[offset];
  } else {
    switch (call.sink_dtype) {
      case DType::kFloat16:
        return Element<Half>::load(static_cast<const Half*>(call.sink.data)[offset]);
      case DType::kBFloat16:
        return Element<BFloat16>::load(static_cast<const BFloat16*>(call.sink.data)[offset]);
      default:
        return static_cast<const float*>(call.sink.data)[offset];
    }
  }
}

// Elements of one part, as they are stored: 1, 2, 4 or 8 bytes each.
template <int kElements>
struct Raw {
  uint4 words[2];

  static __device__ Raw load(const char* from, int64_t element_bytes) {
    Raw raw{};
    if constexpr (kElements == 1) {
      switch (element_bytes) {
        case 1:
          raw.words[0].x = *reinterpret_cast<const uint8_t*>(from);
          break;
        case 2:
          raw.words[0].x = *reinterpret_cast<const uint16_t*>(from);
          break;
        case 4:
          raw.words[0].x = *reinterpret_cast<const uint32_t*>(from);
          break;
        default: {
          const uint2 both = *reinterpret_cast<const uint2*>(from);
          raw.words[0].x = both.x;
          raw.words[0].y = both.y;
        }
      }
    } else if (element_bytes == 1) {
      const uint2 both = load_global(reinterpret_cast<const uint2*>(from));
      raw.words[0].x = both.x;
      raw.words[0].y = both.y;
    } else {
      raw.words[0] = load_global(reinterpret_cast<const uint4*>(from));
      if (element_bytes == 4) raw.words[1] = load_global(reinterpret_cast<const uint4*>(from) + 1);
    }
    return raw;
  }

  __device__ void store(char* to, int64_t element_bytes) const {
    if constexpr (kElements == 1) {
      switch (element_bytes) {
        case 1:
          *reinterpret_cast<uint8_t*>(to) = static_cast<uint8_t>(words[0].x);
          break;
        case 2:
          *reinterpret_cast<uint16_t*>(to) = static_cast<uint16_t>(words[0].x);
          break;
        case 4:
          *reinterpret_cast<uint32_t*>(to) = words[0].x;
          break;
        default:
          *reinterpret_cast<uint2*>(to) = {words[0].x, words[0].y};
      }
    } else if (element_bytes == 1) {
      store_global(reinterpret_cast<uint2*>(to), uint2{words[0].x, words[0].y});
    } else {
      store_global(reinterpret_cast<uint4*>(to), words[0]);
      if (element_bytes == 4) store_global(reinterpret_cast<uint4*>(to) + 1, words[1]);
    }
  }
};

// f(TypeTag<T>) for the dtype of a part or of the result.
template <class Acc, class F>
__device__ void with_dtype(DType dtype, F&& f) {
  if constexpr (sizeof(Acc) == sizeof(double)) {
    f(TypeTag<double>{});
  } else {
    switch (dtype) {
      case DType::kFloat16:
        return f(TypeTag<Half>{});
      case DType::kBFloat16:
        return f(TypeTag<BFloat16>{});
      case DType::kFloat8E4M3:
        return f(TypeTag<Float8E4M3>{});
      case DType::kFloat8E5M2:
        return f(TypeTag<Float8E5M2>{});
      default:
        return f(TypeTag<float>{});
    }
  }
}

template <class Acc, int kElements>
__device__ void unpack(const Raw<kElements>& raw, DType dtype, Acc (&values)[kElements]) {
  with_dtype<Acc>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    Pack<T, kElements> pack;
    memcpy(&pack.word, &raw, sizeof(pack.word));
    pack.unpack(values);
  });
}

template <class Acc, int kElements>
__device__ Raw<kElements> pack(const Acc (&values)[kElements], DType dtype) {
  Raw<kElements> raw{};
  with_dtype<Acc>(dtype, [&](auto tag) {
    using T = typename decltype(tag)::type;
    const auto packed = Pack<T, kElements>::pack(values);
    memcpy(&raw, &packed.word, sizeof(packed.word));
  });
  return raw;
}

template <class Acc, int kElements, class Source>
__global__ void __launch_bounds__(kAnyThreads)
    merge_any(const __grid_constant__ AnyCall<Source> call) {
  constexpr int kAtOnce = SumOfParts<Acc>::kAtOnce, kInFlight = 4;
  __shared__ Acc weights[kAnyWeights];        // [rows][num_parts], of LSEs first
  __shared__ const char* parts[kAnyWeights];  // the row of each; null where it is absent
  __shared__ char* out_rows[kAnyThreads];     // null: nothing is written
  const int num_parts = call.num_parts;
  wait_for_previous();
  Scale scale;
  if (call.out_scale != nullptr) scale = Scale(*call.out_scale);

  for (int64_t first = int64_t{blockIdx.x} * call.rows; first < call.num_rows;
       first += int64_t{gridDim.x} * call.rows) {
    const int count = static_cast<int>(min(int64_t{call.rows}, call.num_rows - first));
    __syncthreads();  // the rows of the round before are done with
    for (int i = threadIdx.x; i < count * num_parts; i += kAnyThreads) {
      const int of_block = static_cast<int>(call.parts.quotient(i)), k = i - of_block * num_parts;
      RowCoordinates row = coordinates(call, first + of_block);
      bool is_absent;
      weights[i] = load_lse<Acc>(call, k, row, is_absent);
      const Part& part = call.source.part(k);
      parts[i] = is_absent ? nullptr
                           : static_cast<const char*>(call.source.output(k)) +
                                 part.output.offset(row) * size_of(part.dtype);
    }
    RowCoordinates own{};
    bool is_written = false;
    Acc lse{};
    PartLse<Acc> sink{};
    if (threadIdx.x < count) {
      own = coordinates(call, first + threadIdx.x);
      if (call.sink.data != nullptr) {
        sink.high = load_sink<Acc>(call, own);
        if (call.mixes_bases && call.rule.out_base == Base::kTwo) sink = natural(sink.high);
      }
      is_written = call.out_index.find(own, call.out_index_is_64_bit);
      out_rows[threadIdx.x] = is_written ? static_cast<char*>(call.out.data) +
                                               call.out.offset(own) * size_of(call.out_dtype)
                                         : nullptr;
    }
    __syncthreads();
    if (threadIdx.x < count) {
      Acc* const mine = weights + threadIdx.x * num_parts;
      const auto part = [&](int k) -> PartLse<Acc> {
        const bool converts = call.mixes_bases && call.source.part(k).base == Base::kTwo;
        return converts ? natural(mine[k]) : PartLse<Acc>{mine[k], Acc(0)};
      };
      lse = weigh_parts<ScalarMath<Acc>, Acc>(
          call.rule, num_parts, part, call.sink.data != nullptr ? &sink : nullptr,
          call.out_lse.data != nullptr, [&](int k) -> Acc& { return mine[k]; });
    }
    __syncthreads();

    const int64_t packs = count * call.row_packs;
    for (int64_t at = threadIdx.x; at < packs; at += kAnyThreads) {
      // One row alone may be longer than 32 bits count.
      const int of_block =
          call.rows == 1 ? 0
                         : static_cast<int>(call.packs_per_row.quotient(static_cast<uint32_t>(at)));
      const int64_t column = (at - of_block * call.row_packs) * kElements;
      char* const to = out_rows[of_block];
      if (to == nullptr) continue;
      const Acc* const mine = weights + of_block * num_parts;
      const char* const* const rows = parts + of_block * num_parts;
      const auto address = [&](int k) {
        const Part& part = call.source.part(k);
        return rows[k] + column * part.element_stride * size_of(part.dtype);
      };

      SumOfParts<Acc> sums[kElements];
      int seen = 0, last = 0;
      for (int begin = 0; begin < num_parts; begin += kInFlight) {
        Raw<kElements> raw[kInFlight]{};
#pragma unroll
        for (int j = 0; j < kInFlight; ++j) {
          const int k = begin + j;
          if (k < num_parts && !(mine[k] < Acc(0)) && rows[k] != nullptr) {
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
    if (is_written && call.out_lse.data != nullptr) {
      static_cast<Acc*>(call.out_lse.data)[call.out_lse.offset(own)] = lse;
    }
  }
}

template <class Source>
void launch_with(const PartsCall& call, const AnyShape& shape, AnyCall<Source>& parameters) {
  const int64_t num_rows = call.num_rows(), row_packs = call.head_size / shape.elements;
  const bool few_rows = num_rows <= kMaxGridX;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    parameters.sizes[dim] = call.sizes[dim];
    parameters.divisors[dim] = FastDivision(few_rows ? static_cast<uint32_t>(call.sizes[dim]) : 1);
  }
  const bool shares_blocks = shape.rows > 1 && row_packs > 0;
  parameters.packs_per_row = FastDivision(shares_blocks ? static_cast<uint32_t>(row_packs) : 1);
  parameters.parts = FastDivision(static_cast<uint32_t>(call.num_parts));
  parameters.num_rows = num_rows;
  parameters.row_packs = row_packs;
  parameters.rows = shape.rows;
  parameters.num_parts = call.num_parts;
  parameters.rule = call.lse_rule();
  parameters.few_rows = few_rows;
  parameters.mixes_bases = call.mixes_bases;
  parameters.invert_empty = call.invert_empty;
  parameters.out_index_is_64_bit = call.out_index_is_64_bit;
  parameters.out_dtype = call.out_dtype;
  parameters.sink_dtype = call.sink_dtype;
  parameters.out = call.out;
  parameters.out_lse = call.out_lse;
  parameters.sink = call.sink;
  parameters.out_element_stride = call.out_element_stride;
  parameters.out_index = call.out_index;
  parameters.out_scale = call.out_scale;
  const Grid grid{.blocks = std::min((num_rows - 1) / shape.rows + 1, kMaxGridX),
                  .threads = kAnyThreads};
  const auto& chosen = call.acc_dtype == DType::kFloat64 ? kernel<merge_any<double, 1, Source>>()
                       : shape.elements == 1             ? kernel<merge_any<float, 1, Source>>()
                                                         : kernel<merge_any<float, 8, Source>>();
  launch(chosen, grid, call, parameters);
}

template <int kMost>
void launch_table(const PartsCall& call, const AnyShape& shape) {
  AnyCall<Table<kMost>> parameters;
  std::copy(call.parts.begin(), call.parts.end(), parameters.source.parts);
  launch_with(call, shape, parameters);
}

}  // namespace

void launch_any(const PartsCall& call, const AnyShape& shape) {
  if (!call.is_stack && call.num_parts <= kFewParts) return launch_table<kFewParts>(call, shape);
  if (!call.is_stack && call.num_parts <= kMaxParts) return launch_table<kMaxParts>(call, shape);
  AnyCall<AlikeTable> parameters;
  parameters.source.first = call.part(0);
  for (int k = 0; k < call.num_parts; ++k) {
    const Part& part = call.part(k);
    const auto advanced = [](const void* data, int64_t bytes) {
      return static_cast<const char*>(data) + bytes;
    };
    parameters.source.outputs[k] =
        advanced(part.output.data, call.output_offset(k) * size_of(part.dtype));
    parameters.source.lses[k] =
        advanced(part.lse.data, call.lse_offset(k) * size_of(call.acc_dtype));
  }
  launch_with(call, shape, parameters);
}

}  // namespace merge_attn_states::cuda
