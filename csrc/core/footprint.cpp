#include "footprint.h"

#include <algorithm>
#include <vector>

namespace merge_attn_states {
namespace {

using Wide = __int128;  // sums of two operands' extents, each below 2^63

// Multiples of one stride, from low to high, that a sum may contain.
struct Term {
  int64_t low;
  int64_t high;
  int64_t stride;
};

Wide floor_div(Wide a, int64_t b) { return a / b - (a % b < 0); }

// Is there a sum of one multiple of each term in [low, high]? Terms stand by descending stride, so
// what the later ones reach bounds the choices of the first; with strides that enclose each other,
// as those of real tensors do, two choices are left at most. `budget` ends contrived searches.
bool reaches(const Term* terms, int count, Wide low, Wide high, int& budget) {
  if (count == 0) return low <= 0 && 0 <= high;
  Wide rest_low = 0, rest_high = 0;
  for (int i = 1; i < count; ++i) {
    rest_low += Wide(terms[i].low) * terms[i].stride;
    rest_high += Wide(terms[i].high) * terms[i].stride;
  }
  const Term& term = terms[0];
  const Wide first = std::max(-floor_div(rest_high - low, term.stride), Wide(term.low));
  const Wide last = std::min(floor_div(high - rest_low, term.stride), Wide(term.high));
  for (Wide k = first; k <= last && --budget > 0; ++k) {
    const Wide here = k * term.stride;
    if (reaches(terms + 1, count - 1, low - here, high - here, budget)) return true;
  }
  return false;
}

bool has_few_runs(const Footprint& a) {
  int64_t runs = 1;
  for (int i = 0; i < a.rank; ++i) {
    if (a.counts[i] > kFewRuns / runs) return false;
    runs *= a.counts[i];
  }
  return true;
}

// Where its runs begin, in bytes behind the first of all, ascending.
std::vector<Wide> run_starts(const Footprint& a) {
  std::vector<Wide> starts = {0};
  for (int i = 0; i < a.rank; ++i) {
    const size_t before = starts.size();
    for (int64_t k = 1; k < a.counts[i]; ++k) {
      for (size_t j = 0; j < before; ++j) starts.push_back(starts[j] + Wide(k) * a.strides[i]);
    }
  }
  std::sort(starts.begin(), starts.end());
  return starts;
}

// One by one, where the search was ended.
bool runs_meet(const Footprint& a, const Footprint& b, Wide distance) {
  const std::vector<Wide> starts = run_starts(a);
  const std::vector<Wide> others = run_starts(b);
  return std::any_of(others.begin(), others.end(), [&](Wide start) {
    const Wide here = distance + start;
    const auto next = std::upper_bound(starts.begin(), starts.end(), here - a.run);
    return next != starts.end() && *next < here + b.run;
  });
}

bool runs_meet(const Footprint& a) {
  const std::vector<Wide> starts = run_starts(a);
  return std::adjacent_find(starts.begin(), starts.end(), [&](Wide one, Wide next) {
           return next < one + a.run;
         }) != starts.end();
}

}  // namespace

bool find_checked_extent(const void* data, const int64_t* sizes, const int64_t* strides, int rank,
                         int64_t element_bytes, Extent& result) {
  result = {};
  if (std::any_of(sizes, sizes + rank, [](int64_t size) { return size == 0; })) return true;
  uint64_t below = 0, above = static_cast<uint64_t>(element_bytes);
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == 1) continue;
    int64_t step, reach;
    if (__builtin_mul_overflow(strides[i], element_bytes, &step) ||
        __builtin_mul_overflow(sizes[i] - 1, step, &reach) || reach == INT64_MIN) {
      return false;
    }
    uint64_t& side = reach < 0 ? below : above;
    if (__builtin_add_overflow(side, static_cast<uint64_t>(reach < 0 ? -reach : reach), &side)) {
      return false;
    }
  }
  const uint64_t address = reinterpret_cast<uintptr_t>(data);
  uint64_t length;
  return !__builtin_add_overflow(below, above, &length) && length <= INT64_MAX &&
         !__builtin_sub_overflow(address, below, &result.begin) &&
         !__builtin_add_overflow(address, above, &result.end);
}

bool nests_in_some_order(const int64_t* sizes, const int64_t* strides, int rank) {
  const auto step = [&](int i) {
    return sizes[i] == 1 ? 0 : strides[i] < 0 ? -strides[i] : strides[i];
  };
  for (int i = 0; i < rank; ++i) {
    int64_t reach = 0;
    for (int j = 0; j < rank; ++j) {
      if (j != i && step(j) <= step(i)) reach += (sizes[j] - 1) * step(j);
    }
    if (sizes[i] != 1 && step(i) <= reach) return false;
  }
  return true;
}

Footprint footprint(const Extent& extent, const int64_t* sizes, const int64_t* strides, int rank,
                    int64_t element_bytes) {
  Footprint result{extent};
  if (extent.empty()) return result;
  int64_t counts[kMaxRank], steps[kMaxRank];
  int dims = 0;
  for (int i = 0; i < rank; ++i) {
    if (sizes[i] == 1) continue;
    const int64_t step = (strides[i] < 0 ? -strides[i] : strides[i]) * element_bytes;
    if (step == 0) {
      result.repeats = true;
      continue;
    }
    int at = dims++;  // insertion by descending stride
    for (; at > 0 && steps[at - 1] < step; --at) {
      steps[at] = steps[at - 1];
      counts[at] = counts[at - 1];
    }
    steps[at] = step;
    counts[at] = sizes[i];
  }
  result.run = element_bytes;
  for (; dims > 0 && steps[dims - 1] == result.run; --dims) result.run *= counts[dims - 1];
  result.rank = dims;
  std::copy(counts, counts + dims, result.counts);
  std::copy(steps, steps + dims, result.strides);
  return result;
}

bool overlaps(const Footprint& a, const Footprint& b, int budget) {
  if (!a.overlaps_range(b)) return false;
  // The lowest and the highest byte of each are touched, whatever lies between them.
  if (a.begin == b.begin || a.end == b.end) return true;
  // A common byte: a.begin + sum_a + [0, a.run) meets b.begin + sum_b + [0, b.run). Terms of equal
  // stride are one term, so that two slices of one buffer cost a handful of steps.
  Term terms[2 * kMaxRank];
  int count = 0;
  for (int i = 0, j = 0; i < a.rank || j < b.rank;) {
    const bool take_a = i < a.rank && (j == b.rank || a.strides[i] >= b.strides[j]);
    const bool take_b = j < b.rank && (i == a.rank || b.strides[j] >= a.strides[i]);
    terms[count++] = {take_b ? -(b.counts[j] - 1) : 0, take_a ? a.counts[i] - 1 : 0,
                      take_a ? a.strides[i] : b.strides[j]};
    i += take_a;
    j += take_b;
  }
  const Wide distance = Wide(b.begin) - Wide(a.begin);
  if (reaches(terms, count, distance - a.run + 1, distance + b.run - 1, budget)) return true;
  return budget <= 0 && has_few_runs(a) && has_few_runs(b) && runs_meet(a, b, distance);
}

bool overlaps_itself(const Footprint& a, int budget) {
  if (a.empty()) return false;
  if (a.repeats) return true;
  // Two different indices: let the first dimension in which they differ be i, the second index the
  // larger one there; all later dimensions are free.
  Term terms[kMaxRank];
  for (int i = a.rank - 1; i >= 0; --i) {
    terms[i] = {1, a.counts[i] - 1, a.strides[i]};
    if (reaches(terms + i, a.rank - i, 1 - a.run, a.run - 1, budget)) return true;
    terms[i].low = 1 - a.counts[i];
  }
  return budget <= 0 && has_few_runs(a) && runs_meet(a);
}

}  // namespace merge_attn_states
