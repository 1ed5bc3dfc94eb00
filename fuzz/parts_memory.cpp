// The part of the contract that needs the operands' memory.
#include "faults.h"
#include "parts_legality.h"

namespace merge_attn_states::fuzz {
namespace {

constexpr int kMostParts = 200;  // of any kind
constexpr int64_t kMostElements = 1 << 16;

bool is_contiguous(const merge_attn_states_tensor& view) {
  __int128 stride = 1;
  for (int i = view.rank - 1; i >= 0 && !is_empty(view); --i) {
    if (view.sizes[i] != 1 && view.strides[i] != stride) return false;
    stride = std::min(stride * view.sizes[i], __int128(1) << 64);
  }
  return true;
}

}  // namespace

Names misplaced(const CallOfParts& call) {
  Names misfitting;
  if (call.is_backward()) {
    const auto& device = call.reference().view;
    const uint32_t first = call.parts[0].output.view.dtype, narrow = first == kF64 ? kF64 : kF32;
    bool are_mixed = false;
    for (const FuzzedPart& part : call.parts) are_mixed |= part.output.view.dtype != first;
    std::vector<int64_t> shape = call.shape();
    shape.insert(shape.begin(),
                 call.is_stack ? device.sizes[call.stack_dim()] : call.args.num_parts);
    const auto expect = [&](const Operand& gradient, const std::vector<int64_t>& sizes,
                            uint32_t dtype) {
      const bool fits = !gradient.given ||
                        (has_shape(gradient.view, sizes) && gradient.view.dtype == dtype &&
                         is_on_device_of(gradient.view, device) && is_contiguous(gradient.view));
      if (!fits) misfitting.insert(gradient.name);
    };
    expect(call.grad_outputs, shape, are_mixed ? kF32 : first);
    shape.pop_back();
    expect(call.grad_lses, shape, narrow);
    shape.erase(shape.begin());
    expect(call.grad_sink, shape, narrow);
  }
  Names names = misfitting;
  for (const Operand* operand : call.operands()) {
    if (operand->given && misfitting.count(operand->name) == 0 && !is_well_placed(operand->view)) {
      names.insert(operand->name);
    }
  }
  return names;
}

namespace {

// What of an operand is looked at as one: of a stack each part, of an LSE its rows.
std::vector<View> views_of(const CallOfParts& call, const Operand& operand) {
  std::vector<View> views;
  for (const FuzzedPart& part : call.parts) {
    if (&operand != &part.output && &operand != &part.lse) continue;
    const int64_t count = call.is_stack ? part.output.view.sizes[call.stack_dim()] : 1;
    const int rank = call.row_dims() + call.is_stack + (&operand == &part.output);
    for (int64_t k = 0; k < count; ++k) {
      views.emplace_back(call.regions, operand, rank, call.stack_dim(), k);
    }
  }
  if (views.empty()) views.emplace_back(call.regions, operand, operand.view.rank);
  return views;
}

// Where `written` may lie exactly: a result on a part's output, its LSE on a part's LSE, unless
// rows are gathered.
bool is_a_place_for(const CallOfParts& call, const Operand& written, const Operand& other) {
  const bool is_lse = &written == &call.written_lse();
  bool is_place = false;
  for (const FuzzedPart& part : call.parts) {
    if (part.index.given || call.is_backward()) return false;
    is_place |= &other == (is_lse ? &part.lse : &part.output);
  }
  return is_place;
}

}  // namespace

Names overlapping(const CallOfParts& call) {
  Names names;
  std::vector<uint8_t> marks;
  for (const Operand* written : call.written()) {
    if (!written->given || is_empty(written->view)) continue;
    const Region& region = call.regions[written->region];
    // Otherwise no operand has more elements than can be looked at.
    const bool crowded = is_crowded(region, written->view);
    if (crowded || !mark(region, written->view, marks)) names.insert(written->name);
    if (crowded) continue;
    const bool is_lse = written == &call.written_lse();
    const View result(call.regions, *written, is_lse ? call.row_dims() : written->view.rank);
    for (const Operand* other : call.operands()) {
      if (!other->given || other == written || other->region != written->region) continue;
      const bool may_be_same = is_a_place_for(call, *written, *other);
      for (const View& view : views_of(call, *other)) {
        if (may_be_same && is_same(result.view, view.view)) continue;
        const bool is_small = count_of(view.view) <= kMostElements;
        if (is_small && meets(region, view.view, marks)) names.insert(written->name);
      }
    }
  }
  return names;
}

bool takes_too_long(const CallOfParts& call) {
  for (const Operand* operand : call.operands()) {
    if (operand->given && count_of(operand->view) > kMostElements) return true;
  }
  return false;
}

namespace {

bool are_alike(const CallOfParts& call, const FuzzedPart& a, const FuzzedPart& b) {
  const auto same_strides = [&](const Operand& x, const Operand& y, int rank) {
    bool same = true;
    for (int i = 0; i < rank && !is_empty(x.view); ++i) {
      same &= x.view.sizes[i] == 1 || x.view.strides[i] == y.view.strides[i];
    }
    return same;
  };
  return !a.index.given && !b.index.given && !a.empty.given && !b.empty.given &&
         a.output.view.dtype == b.output.view.dtype && a.part.lse_base == b.part.lse_base &&
         same_strides(a.output, b.output, call.row_dims() + 1) &&
         same_strides(a.lse, b.lse, call.row_dims());
}

}  // namespace

Names out_of_range(const CallOfParts& call) {
  if (takes_too_long(call)) return {};
  Names names;
  bool alike = true;
  for (const FuzzedPart& part : call.parts) {
    alike &= are_alike(call, call.parts[0], part);
    const auto& view = part.index.view;
    if (!part.index.given || view.device_type != MERGE_ATTN_STATES_CPU) continue;
    const int64_t num_rows = part.output.view.sizes[0];
    for (int64_t i = 0; i < view.sizes[0]; ++i) {
      const int64_t row = row_at(call, part, i);
      if (row < -1 || row >= num_rows) names.insert(part.index.name);
    }
  }
  const bool lists = !call.is_update() && !call.is_stack;
  if (names.empty() && lists && !alike && call.args.num_parts > kMostParts) return {"outputs"};
  return names;
}

}  // namespace merge_attn_states::fuzz
