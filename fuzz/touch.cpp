#include "touch.h"

#include <algorithm>

namespace merge_attn_states::fuzz {

bool is_described(const merge_attn_states_tensor& view) {
  return view.rank >= 0 && (view.rank == 0 || (view.sizes && view.strides));
}

bool is_well_placed(const merge_attn_states_tensor& view) {
  if (is_empty(view)) return true;
  const bool aligned = reinterpret_cast<uintptr_t>(view.data) % bytes_of(view.dtype) == 0;
  const bool told = view.memory_bytes == 0 ||
                    (view.memory_bytes > 0 && is_inside(view, view.memory, view.memory_bytes));
  return view.data != nullptr && aligned && told;
}

bool is_on_a_device(const merge_attn_states_tensor& view) {
  return view.device_type == MERGE_ATTN_STATES_CPU || view.device_type == MERGE_ATTN_STATES_CUDA;
}

bool is_on_device_of(const merge_attn_states_tensor& view, const merge_attn_states_tensor& other) {
  return view.device_type == other.device_type &&
         (view.device_type == MERGE_ATTN_STATES_CPU || view.device_index == other.device_index);
}

bool has_shape(const merge_attn_states_tensor& view, const std::vector<int64_t>& sizes) {
  return is_described(view) &&
         std::equal(view.sizes, view.sizes + view.rank, sizes.begin(), sizes.end());
}

bool is_same(const merge_attn_states_tensor& a, const merge_attn_states_tensor& b) {
  bool same = a.data == b.data && a.dtype == b.dtype && a.rank == b.rank;
  for (int32_t i = 0; same && i < a.rank; ++i) {
    same = a.sizes[i] == b.sizes[i] && (a.sizes[i] == 1 || a.strides[i] == b.strides[i]);
  }
  return same;
}

bool is_crowded(const Region& region, const merge_attn_states_tensor& view) {
  return count_of(view) > static_cast<__int128>(region.size);
}

bool mark(const Region& region, const merge_attn_states_tensor& view, std::vector<uint8_t>& marks) {
  marks.assign(region.size, false);
  bool once = true;
  for_each_element(view, [&](const Index&, const uint8_t* address) {
    for (int64_t i = 0; i < bytes_of(view.dtype); ++i) {
      uint8_t& marked = marks[address + i - region.bytes.get()];
      once = once && !marked;
      marked = 1;
    }
  });
  return once;
}

bool meets(const Region& region, const merge_attn_states_tensor& view,
           const std::vector<uint8_t>& marks) {
  std::vector<uint8_t> others;
  mark(region, view, others);
  for (size_t i = 0; i < marks.size(); ++i) {
    if (marks[i] && others[i]) return true;
  }
  return false;
}

}  // namespace merge_attn_states::fuzz
