#include "place.h"

#include <algorithm>
#include <iterator>
#include <numeric>

#include "values.h"

namespace merge_attn_states::fuzz {
namespace {

// Elements of an operand with any strides: two of so many are compared before the library's search
// for a common byte gives up.
constexpr int64_t kMostSearched = 32;

constexpr __int128 kLargestRegion = 1 << 18;

// Numbers at which 32-bit and 64-bit arithmetic breaks.
constexpr int64_t kOddNumbers[] = {0,
                                   -1,
                                   INT32_MAX,
                                   INT32_MIN,
                                   int64_t(1) << 32,
                                   int64_t(1) << 59,
                                   int64_t(1) << 60,
                                   int64_t(1) << 61,
                                   int64_t(1) << 62,
                                   -(int64_t(1) << 62),
                                   INT64_MAX / 3,
                                   INT64_MAX / 5,
                                   INT64_MAX / 9,
                                   INT64_MAX,
                                   INT64_MIN,
                                   INT64_MIN / 3};

void place_alone(Regions& regions, Operand& operand) {
  const Extent extent = extent_of(operand.view);
  const bool fits = extent.high - extent.low <= kLargestRegion;
  // At least a byte, since memory of 0 bytes means that its size is unknown.
  const size_t size = fits ? static_cast<size_t>(extent.high - extent.low) : 64;
  operand.region = add_region(regions, std::max<size_t>(1, size));
  operand.view.data = regions[operand.region].bytes.get();
  if (fits) operand.view.data = static_cast<uint8_t*>(operand.view.data) - int64_t(extent.low);
}

void place_shared(const Regions& regions, Operand& operand, size_t offset, bool aligned) {
  const Extent extent = extent_of(operand.view);
  const int64_t bytes = bytes_of(operand.view.dtype);
  if (aligned) offset -= offset % bytes;
  if (-extent.low < kLargestRegion) offset += static_cast<size_t>(-extent.low);
  operand.region = 0;
  operand.view.data = regions[0].bytes.get() + offset % kSharedBytes;
}

// Both begin at one address, in new memory that holds both.
void place_together(Regions& regions, Operand& operand, Operand& other) {
  const Extent extent = extent_of(operand.view), others = extent_of(other.view);
  constexpr int64_t kWidest = sizeof(double);
  const __int128 low = std::min(extent.low, others.low) / kWidest * kWidest - kWidest;
  const __int128 high = std::max(extent.high, others.high);
  if (high - low > kLargestRegion) return place_alone(regions, operand);
  operand.region = other.region = add_region(regions, static_cast<size_t>(high - low));
  operand.view.data = other.view.data = &regions[operand.region].bytes[int64_t(-low)];
}

}  // namespace

int64_t Bytes::odd_number() {
  const uint64_t base = static_cast<uint64_t>(kOddNumbers[next() % std::size(kOddNumbers)]);
  return static_cast<int64_t>(base + static_cast<int8_t>(next()));
}

// Dense in one of the orders of the dimensions, then widened, reversed and repeated; or any that
// fit into a region.
void read_strides(Operand& operand, Bytes& bytes) {
  const uint8_t order = bytes.next(), widen = bytes.next(), reverse = bytes.next();
  const int rank = static_cast<int>(operand.sizes.size());
  operand.strides.assign(rank, 1);
  const auto product = [](int64_t a, int64_t b) {
    return std::clamp<int64_t>(a, -1, kMostSearched) * std::clamp<int64_t>(b, -1, kMostSearched);
  };
  const int64_t count =
      std::accumulate(operand.sizes.begin(), operand.sizes.end(), int64_t(1), product);
  if (order >= 0xc0 && count <= kMostSearched) {
    Random random(order | widen << 8 | reverse << 16);
    for (int64_t& each : operand.strides) each = int64_t(random.below(6000)) - 3000;
    return;
  }
  std::vector<int> at(rank);
  std::iota(at.rbegin(), at.rend(), 0);
  for (int turn = order % (rank > 3 ? 31 : 6); turn > 0; --turn) {
    std::next_permutation(at.begin(), at.end());
  }
  int64_t stride = 1 + (widen & 3);
  for (int i = 0; i < rank; ++i) {
    const int dim = at[i];
    operand.strides[dim] = (reverse >> dim & 1) ? -stride : stride;
    if (reverse >> (dim + 4) & 1) operand.strides[dim] = 0;
    stride *= std::clamp<int64_t>(operand.sizes[dim], 1, 1 << 20);
    stride += widen >> (2 + 2 * i) & 3;
  }
}

void place(Regions& regions, Operand& operand, Bytes& bytes,
           const std::function<Operand*(uint8_t)>& partner) {
  const uint8_t where = bytes.next() % 8, low = bytes.next(), high = bytes.next();
  Operand* const found = where > 5 ? partner(high) : nullptr;
  if (where < 3 || (where > 5 && found == nullptr)) return place_alone(regions, operand);
  if (where < 6) return place_shared(regions, operand, low | high << 8, where != 5);
  Operand& other = *found;
  if (where == 7 && (high & 2) != 0) return place_together(regions, operand, other);
  const bool as_it_is = other.sizes.size() == operand.sizes.size() && where == 6;
  if (as_it_is) operand.strides = other.strides, point_view(operand);
  operand.region = other.region;
  const int64_t shift = static_cast<int8_t>(low) * bytes_of(operand.view.dtype);
  operand.view.data = reinterpret_cast<void*>(reinterpret_cast<uintptr_t>(other.view.data) + shift);
}

void declare_memory(const Region& region, merge_attn_states_tensor& view, uint8_t mode) {
  const int64_t size = static_cast<int64_t>(region.size);
  view.memory = region.bytes.get();
  view.memory_bytes = size;
  if (!is_inside(view, view.memory, size) || is_empty(view)) return;
  const Extent extent = extent_of(view);
  const uint8_t* low = static_cast<const uint8_t*>(view.data) + int64_t(extent.low);
  const int64_t length = static_cast<int64_t>(extent.high - extent.low);
  switch (mode % 8) {
    case 0:
      view.memory_bytes = 0;
      break;
    case 1:
      view.memory = low, view.memory_bytes = length;
      break;
    case 2:
      view.memory = low, view.memory_bytes = length - 1;  // 0 is "unknown", and legal
      break;
    case 3:
      view.memory = low + 1, view.memory_bytes = length;
      break;
    case 4:
      view.memory_bytes = -length;
      break;
    case 5:
      view.memory = nullptr, view.memory_bytes = INT64_MAX;
      break;
    default:
      break;
  }
}

}  // namespace merge_attn_states::fuzz
