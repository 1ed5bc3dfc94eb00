#include "operand.h"

namespace merge_attn_states::fuzz {

int add_region(Regions& regions, size_t size) {
  regions.push_back({std::make_unique<uint8_t[]>(size), size, {}});
  return static_cast<int>(regions.size()) - 1;
}

void point_view(Operand& operand) {
  operand.view.sizes = operand.sizes.data();
  operand.view.strides = operand.strides.data();
  operand.view.rank = static_cast<int32_t>(operand.sizes.size());
}

int64_t bytes_of(uint32_t dtype) { return (dtype >> 8 & 0xff) / 8; }

bool is_empty(const merge_attn_states_tensor& view) {
  return std::any_of(view.sizes, view.sizes + view.rank, [](int64_t size) { return size == 0; });
}

Extent extent_of(const merge_attn_states_tensor& view) {
  if (is_empty(view)) return {0, 0};
  const int64_t bytes = bytes_of(view.dtype);
  Extent extent{0, bytes};
  for (int32_t i = 0; i < view.rank; ++i) {
    // At most 2^63 * 2^63 * 2^5: saturated far below, since all that matters is "too far".
    const __int128 most = __int128(1) << 80;
    const __int128 reach =
        std::clamp(__int128(view.sizes[i] - __int128(1)) * view.strides[i], -most, most) * bytes;
    (reach < 0 ? extent.low : extent.high) += reach;
  }
  return extent;
}

__int128 count_of(const merge_attn_states_tensor& view) {
  if (is_empty(view)) return 0;
  __int128 count = 1;
  for (int32_t i = 0; i < view.rank; ++i) {
    count = std::min(count * view.sizes[i], __int128(1) << 64);
  }
  return count;
}

bool is_inside(const merge_attn_states_tensor& view, const void* memory, int64_t size) {
  if (view.rank < 0 || (view.rank > 0 && (view.sizes == nullptr || view.strides == nullptr))) {
    return false;
  }
  if (is_empty(view)) return true;
  const __int128 begin = reinterpret_cast<uintptr_t>(memory);
  const __int128 data = reinterpret_cast<uintptr_t>(view.data);
  const Extent extent = extent_of(view);
  return begin <= data + extent.low && data + extent.high <= begin + size;
}

const uint8_t* address_of(const merge_attn_states_tensor& view, const Index& index) {
  int64_t offset = 0;
  for (int32_t at = 0; at < std::min(view.rank, kMostDimensions); ++at) {
    if (view.sizes[at] != 1) offset += index[at] * view.strides[at];
  }
  return static_cast<const uint8_t*>(view.data) + offset * bytes_of(view.dtype);
}

const uint8_t* before(const Region& region, const merge_attn_states_tensor& view,
                      const Index& index) {
  return region.before.data() + (address_of(view, index) - region.bytes.get());
}

void pass(const Regions& regions, Operand& operand) {
  const Region& region = regions[operand.region];
  if (!is_inside(operand.view, region.bytes.get(), static_cast<int64_t>(region.size))) {
    operand.passed.size = std::max(operand.passed.size, sizeof(operand.view));
  }
  pass(operand.view, operand.passed);
}

}  // namespace merge_attn_states::fuzz
