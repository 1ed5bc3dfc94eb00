// Whether a kernel family can take a call, and how it is cut into blocks. Knows strides, sizes and
// tuning.h; nothing of CUDA.
#include <algorithm>
#include <bit>
#include <cstdint>

#include "families.h"
#include "tuning.h"

namespace merge_attn_states::cuda {
namespace {

bool is_aligned(const Rows& rows, int64_t element_bytes, int64_t pack_bytes) {
  const auto multiple = [=](int64_t value) { return value % pack_bytes == 0; };
  return rows.element_stride == 1 && multiple(reinterpret_cast<intptr_t>(rows.data)) &&
         multiple(rows.token_stride * element_bytes) && multiple(rows.head_stride * element_bytes);
}

// Whole rows consist of aligned packs of `bytes` of input, and the output's of as many elements.
bool consists_of_packs(const MergeCall& call, int64_t bytes) {
  const int64_t input_bytes = size_of(call.input_dtype), output_bytes = size_of(call.output_dtype);
  const int64_t elements = bytes / input_bytes;
  return call.geometry.head_size > 0 && call.geometry.head_size % elements == 0 &&
         is_aligned(call.parts.prefix.output, input_bytes, bytes) &&
         is_aligned(call.parts.suffix.output, input_bytes, bytes) &&
         is_aligned(call.merged.output, output_bytes, elements * output_bytes);
}

int64_t packs_per_row(const MergeCall& call) {
  return call.geometry.head_size * size_of(call.input_dtype) / 16;
}

// The highest element of an operand, and none below its first.
bool reaches_at_most(int64_t limit, const Geometry& geometry, int64_t token_stride,
                     int64_t head_stride) {
  return token_stride >= 0 && head_stride >= 0 &&
         (geometry.num_tokens - 1) * token_stride + (geometry.num_heads - 1) * head_stride <= limit;
}

// Offsets in packs, of LSEs in elements, have 32 bits.
bool fits_32_bits(const MergeCall& call) {
  constexpr int64_t kReach = UINT32_MAX;
  const Geometry& geometry = call.geometry;
  const int64_t elements = 16 / size_of(call.input_dtype);
  const auto fits = [&](const State& state) {
    const auto& [rows, lses] = state;
    return reaches_at_most(kReach * elements - geometry.head_size, geometry, rows.token_stride,
                           rows.head_stride) &&
           reaches_at_most(kReach, geometry, lses.token_stride, lses.head_stride);
  };
  return fits(call.parts.prefix) && fits(call.parts.suffix) && fits(call.merged) &&
         std::max(geometry.num_tokens, geometry.num_heads) <= kMaxGridX / 2;
}

int64_t tiles(int64_t rows, int64_t of_tile) { return (rows - 1) / of_tile + 1; }

}  // namespace

std::optional<PairShape> pair_shape(const MergeCall& call, int capability) {
  const bool supported = call.input_dtype == DType::kFloat32 ||
                         call.input_dtype == DType::kFloat16 ||
                         call.input_dtype == DType::kBFloat16;
  const int64_t packs_a_row = packs_per_row(call);
  if (!supported || !consists_of_packs(call, 16) || packs_a_row > kMaxThreads ||
      !fits_32_bits(call)) {
    return std::nullopt;
  }
  const Tuning& tuning = tuning_of(capability);
  const auto& [num_tokens, num_heads, head_size] = call.geometry;
  const int64_t packs = num_tokens * num_heads * packs_a_row;  // fits: so do all offsets
  PairShape shape{};
  shape.weighs_by_tile = packs > tuning.rows_packs;
  const int threads = !shape.weighs_by_tile       ? tuning.rows_threads
                      : packs < tuning.dram_packs ? tuning.tiles_threads
                                                  : tuning.dram_threads;
  const int64_t rows = std::max<int64_t>(1, threads / packs_a_row);

  const Lses& lse = call.parts.suffix.lse;
  const bool heads_are_contiguous = lse.head_stride == 1 && lse.token_stride != 1;
  const bool tokens_fill_tiles = num_tokens >= kFewestTokenTiles * rows || num_tokens > num_heads;
  shape.tokens_inside = !heads_are_contiguous && tokens_fill_tiles;
  const Rows& part = call.parts.prefix.output;
  const bool tokens_are_closer = num_tokens > 1 && part.token_stride < part.head_stride;
  const int64_t inner = shape.tokens_inside ? num_tokens : num_heads;
  shape.rows = static_cast<int>(std::min(rows, inner));
  const auto whole_warps = [](int64_t threads) {
    return static_cast<int>((threads + 31) / 32 * 32);
  };
  shape.value_threads = whole_warps(shape.rows * packs_a_row);
  const bool merges_lses_apart = !shape.weighs_by_tile && call.merged.lse.data != nullptr;
  shape.lse_threads = merges_lses_apart ? whole_warps(shape.rows) : 0;
  shape.inner_tiles = tiles(inner, shape.rows);
  shape.outer_tiles = shape.tokens_inside ? num_heads : num_tokens;
  // In the order of memory. But blocks of rows that are kept are done at once: among the others
  // they cost nothing, and behind them they would leave the GPU half empty.
  const bool wants_inner_first =
      shape.tokens_inside == tokens_are_closer || call.has_rows_to_keep();
  const bool has_room = shape.inner_tiles <= kMaxGridY;
  shape.inner_first =
      shape.weighs_by_tile && shape.outer_tiles <= kMaxGridY && (wants_inner_first || !has_room);
  if (!shape.inner_first && !has_room) return std::nullopt;
  return shape;
}

GenericShape generic_shape(const MergeCall& call) {
  const bool packs = consists_of_packs(call, kGenericPackBytes);
  const int64_t elements = packs ? kGenericPackBytes / size_of(call.input_dtype) : 1;
  const int64_t wanted = std::max(kGenericElements, kGenericThreads * kGenericUnroll * elements);
  const int64_t most =
      std::clamp<int64_t>(call.geometry.num_rows() / kGenericBlocks, 1, kGenericMaxRows);
  const int64_t head_size = std::max<int64_t>(1, call.geometry.head_size);
  return {.rows = static_cast<int>(std::clamp<int64_t>(wanted / head_size, 1, most)),
          .pack_elements = static_cast<int>(elements)};
}

namespace {

bool is_multiple(int64_t value, int64_t of) { return value % of == 0; }

// Whether each row of an output consists of aligned packs of so many elements.
bool has_packs(const PerRow& output, int64_t element_stride, int64_t element_bytes,
               int64_t elements) {
  const int64_t bytes = std::min<int64_t>(16, elements * element_bytes);
  bool all = element_stride == 1 && is_multiple(reinterpret_cast<intptr_t>(output.data), bytes);
  for (const int64_t stride : output.strides) all &= is_multiple(stride * element_bytes, bytes);
  return all;
}

// The offset of each row, in units of so many elements, has 32 bits.
bool reaches_at_most_32_bits(const PartsCall& call, const PerRow& operand, int64_t unit) {
  int64_t reach = 0;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    if (operand.strides[dim] < 0) return false;
    reach += (call.sizes[dim] - 1) * operand.strides[dim];
  }
  return reach / unit <= UINT32_MAX - call.head_size;
}

}  // namespace

std::optional<AlikeShape> alike_shape(const PartsCall& call) {
  const Part& first = call.part(0);
  const int64_t size = size_of(call.out_dtype), elements = 16 / size;
  // What has a pair's weights has its logarithm too, which merge_few has not.
  if (call.lse_rule().is_pair || !call.parts_are_alike || !is_float(call.out_dtype) ||
      first.dtype != call.out_dtype || call.mixes_bases || call.sizes[2] != 1 ||
      call.sizes[3] != 1 || call.num_rows() > kMaxGridX || !is_multiple(call.head_size, elements) ||
      call.head_size == 0 || call.head_size / elements > kFewMostPacks ||
      !has_packs(call.out, call.out_element_stride, size, elements) ||
      !reaches_at_most_32_bits(call, call.out, elements) ||
      !reaches_at_most_32_bits(call, first.output, elements)) {
    return std::nullopt;
  }
  for (const PerRow* each : {&call.out_lse, &first.lse, &call.sink}) {
    if (!reaches_at_most_32_bits(call, *each, 1)) return std::nullopt;
  }
  for (const Part& part : call.parts) {
    if (!has_packs(part.output, part.element_stride, size, elements)) return std::nullopt;
  }
  if (call.is_stack && !is_multiple(call.stack_output_stride, elements)) return std::nullopt;
  const int packs = static_cast<int>(call.head_size / elements);
  if (call.num_parts > kFewParts) return AlikeShape{packs, 1, kManyThreads, 0};
  const int rows =
      static_cast<int>(std::min<int64_t>(std::max(1, kFewThreads / packs), call.num_rows()));
  const auto whole_warps = [](int threads) { return (threads + 31) / 32 * 32; };
  const bool wants_lse = call.out_lse.data != nullptr;
  return AlikeShape{packs, rows, whole_warps(rows * packs), wants_lse ? whole_warps(rows) : 0};
}

namespace {

AnyShape shape_with(const PartsCall& call, int64_t pack) {
  bool packs = call.acc_dtype == DType::kFloat32 && is_multiple(call.head_size, pack) &&
               call.head_size > 0 &&
               has_packs(call.out, call.out_element_stride, size_of(call.out_dtype), pack);
  for (const Part& part : call.parts) {
    packs &= has_packs(part.output, part.element_stride, size_of(part.dtype), pack);
  }
  if (call.is_stack) packs &= is_multiple(call.stack_output_stride, pack);
  const int64_t most = std::clamp<int64_t>(call.num_rows() / kGenericBlocks, 1,
                                           std::min(kAnyWeights / call.num_parts, kAnyThreads));
  const int64_t wanted = kAnyElements / std::max<int64_t>(1, call.head_size);
  return {.rows = static_cast<int>(std::clamp<int64_t>(wanted, 1, most)),
          .elements = packs ? static_cast<int>(pack) : 1};
}

}  // namespace

AnyShape any_shape(const PartsCall& call) { return shape_with(call, kAnyPack); }

namespace {

// Strides that a kernel multiplies as 32-bit numbers.
bool has_short_strides(const PerRow& operand) {
  return std::ranges::all_of(operand.strides,
                             [](int64_t stride) { return stride >= 0 && stride <= UINT32_MAX; });
}

bool has_short_strides(const Part& part) {
  return has_short_strides(part.output) && has_short_strides(part.lse) &&
         has_short_strides(part.empty) && part.index.num_rows <= UINT32_MAX &&
         part.index.stride >= 0 && part.index.stride <= UINT32_MAX;
}

}  // namespace

std::optional<EachShape> each_shape(const PartsCall& call) {
  const DType first = call.part(0).dtype, others = call.dtype_of_others();
  if (call.num_parts > kEachParts || call.mixes_bases || !is_float(first) ||
      !is_float(call.out_dtype) || (first != others && first != DType::kFloat32) ||
      any_shape(call).elements != kAnyPack || call.num_rows() > kMaxGridX ||
      !has_short_strides(call.out) || !has_short_strides(call.out_lse) ||
      !has_short_strides(call.sink)) {
    return std::nullopt;
  }
  EachShape shape{};
  for (int k = 0; k < static_cast<int>(call.parts.size()); ++k) {
    const Part& part = call.parts[k];
    if ((k > 0 && part.dtype != others) || !has_short_strides(part)) return std::nullopt;
    shape.selects |= part.index.data != nullptr || part.empty.data != nullptr;
  }
  const int64_t of_lane = each_elements(room_for(call.num_parts), shape.selects);
  const int64_t lanes = (call.head_size + of_lane - 1) / of_lane;
  if (lanes > kEachThreads) return std::nullopt;
  shape.lanes = static_cast<int>(lanes);
  shape.rows = kEachThreads / shape.lanes;
  return shape;
}

std::optional<EachShape> each_backward_shape(const PartsCall& call) {
  auto shape = each_shape(call);
  const DType dtype = call.out_dtype;
  const auto lanes = std::bit_ceil(shape ? static_cast<unsigned>(shape->lanes) : 1);
  if (!shape || lanes > 32 || call.part(0).dtype != dtype || call.dtype_of_others() != dtype ||
      call.gradients.outputs_dtype != dtype ||
      !is_multiple(reinterpret_cast<intptr_t>(call.gradients.outputs), 16)) {
    return std::nullopt;
  }
  shape->lanes = static_cast<int>(lanes);
  shape->rows = kEachThreads / shape->lanes;
  return shape;
}

AnyShape backward_shape(const PartsCall& call) {
  AnyShape shape = shape_with(call, kBackwardPack);
  const auto is_aligned = reinterpret_cast<intptr_t>(call.gradients.outputs) % 16 == 0;
  if (!is_aligned) shape.elements = 1;
  return shape;
}

}  // namespace merge_attn_states::cuda
