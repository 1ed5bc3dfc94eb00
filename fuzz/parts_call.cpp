// Reads a call from bytes: some of the call, then some of each part, then some of each operand that
// there is once. Every field has a fixed place, so that a mutation is a local change.
#include "parts_call.h"

#include "faults.h"
#include "parts_layout.h"

namespace merge_attn_states::fuzz {
namespace {

constexpr int64_t kSizes[] = {2, 1, 3, 1, 4, 2, 5, 3, 7, 8, 9, 16, 17, 24, 33, 2};
constexpr Entry kEntries[] = {Entry::kMerge,    Entry::kMerge,  Entry::kUpdate,
                              Entry::kBackward, Entry::kMerge,  Entry::kMerge,
                              Entry::kBackward, Entry::kUpdate, Entry::kMerge};
// Most parts, and most of any kind, are limits; 16 are summed at once.
constexpr int kNumParts[] = {2, 3, 1,  4,  2,  5,  3, 8, 2, 3, 1,  4,  2,   3,   6,    2,
                             7, 9, 12, 16, 17, 20, 2, 3, 1, 4, 18, 33, 200, 201, 1024, 1025};
constexpr uint32_t kMixed = 0, kKinds[] = {kF32, kMixed, kF16, kBF16, kMixed, kF64, kE4M3, kE5M2};
constexpr uint32_t kFloats[] = {kF32, kF16, kBF16, kE4M3, kE5M2};  // FP8 of a result alone
constexpr size_t kMostParts = 20;

struct Shape {
  std::vector<int64_t> rows;
  int64_t head_size;

  std::vector<int64_t> with(std::vector<int64_t> sizes, int64_t last) const {
    sizes.push_back(last);
    return sizes;
  }
};

// Small in all but a dimension; any number, rarely.
Shape read_shape(Bytes& bytes, int64_t most) {
  Shape shape;
  const uint8_t rank = bytes.next() % 8, odd = bytes.next();
  const auto size = [&] {
    const uint8_t byte = bytes.next();
    const int64_t result = byte >= 0xf8 ? 0 : std::clamp<int64_t>(pick(kSizes, byte), 1, most);
    most /= std::max<int64_t>(1, result);
    return result;
  };
  constexpr int kRanks[] = {2, 1, 3, 4, 2, 3, 2, 1};
  for (int i = 0; i < 4; ++i) {
    const int64_t next = size();
    if (i < kRanks[rank]) shape.rows.push_back(next);
  }
  shape.head_size = size();
  const int64_t number = bytes.odd_number();
  if (odd % 32 == 1) shape.rows[odd / 32 % shape.rows.size()] = number;
  if (odd % 32 == 2) shape.head_size = number;
  return shape;
}

void describe(Operand& operand, const std::string& name, uint32_t dtype,
              const std::vector<int64_t>& sizes, bool given = true) {
  operand.name = name;
  operand.view.dtype = dtype;
  operand.view.device_type = MERGE_ATTN_STATES_CPU;
  operand.sizes = sizes;
  operand.given = given;
}

void describe_parts(CallOfParts& call, Bytes& bytes, const Shape& shape, uint32_t kind,
                    uint8_t bases, bool may_index) {
  const bool stack = call.is_stack;
  for (size_t k = 0; k < call.parts.size(); ++k) {
    bytes.seek(bytes_of_part(k));
    const uint8_t dtype = bytes.next(), flags = bytes.next(), row_count = bytes.next();
    FuzzedPart& part = call.parts[k];
    const bool is_state = call.is_update() && k == 0, is_block = call.is_update() && k == 1;
    const bool has_index = !stack && !is_block && may_index && (flags & 1);
    std::vector<int64_t> rows = shape.rows;
    const int64_t num_rows = rows[0];
    if (has_index) rows[0] = row_count >= 0xf8 ? 0 : pick(kSizes, row_count);
    if (stack) rows.insert(rows.begin() + call.args.stack_dim, call.num_parts);
    const uint32_t of_output = kind == kMixed ? kFloats[dtype % 3] : kind;
    const uint32_t of_lse = kind == kF64 ? kF64 : kF32;
    const std::vector<int64_t> per_row = flags & 2 ? shape.with(rows, 1) : rows;
    const std::string number = stack ? "" : "[" + std::to_string(k) + "]";
    describe(part.output,
             is_state   ? "out"
             : is_block ? "block_out"
                        : "outputs" + number,
             of_output, shape.with(rows, shape.head_size));
    describe(part.lse,
             is_state   ? "lse"
             : is_block ? "block_lse"
                        : "lses" + number,
             of_lse, per_row);
    describe(part.empty, is_block ? "empty" : "empty" + number, MERGE_ATTN_STATES_BOOL,
             flags & 4 ? shape.with(rows, 1) : rows, !stack && !is_state && flags >> 3 & 1);
    describe(part.index, is_state ? "index" : "index" + number,
             flags & 16 ? MERGE_ATTN_STATES_INT64 : MERGE_ATTN_STATES_INT32, {num_rows}, has_index);
    part.part.lse_base = bases % 4 == 1 ? 1 : bases % 4 == 2 ? flags >> 5 & 1 : 0;
  }
}

void describe_others(CallOfParts& call, const Shape& shape, uint32_t kind, uint8_t flags,
                     uint8_t dtype) {
  const bool backward = call.is_backward();
  const uint32_t first = call.parts[0].output.view.dtype, of_lse = kind == kF64 ? kF64 : kF32;
  // Of FP8 parts FP8 of their own format.
  uint32_t of_out = dtype == 0 || kind == kF64 ? first : kFloats[dtype % (backward ? 3 : 5)];
  if (is_fp8(first) && is_fp8(of_out)) of_out = first;
  const bool quantizes = is_fp8(of_out) && !is_fp8(first);
  const auto& rows = shape.rows;
  describe(call.out, backward ? "grad_out" : "out", of_out, shape.with(rows, shape.head_size));
  describe(call.out_lse, backward ? "grad_out_lse" : "out_lse", of_lse,
           flags & 1 ? shape.with(rows, 1) : rows, !(flags & 2));
  describe(call.sink, "sink", kind == kF64 ? kF64 : kFloats[dtype / 8 % 3], {rows.back()},
           flags & 4);
  describe(call.scale, "out_scale", kF32, {}, quantizes || (is_fp8(of_out) && flags & 8));
  bool mixed = false;
  for (const FuzzedPart& part : call.parts) mixed |= part.output.view.dtype != first;
  std::vector<int64_t> of_parts = rows;
  of_parts.insert(of_parts.begin(), call.num_parts);
  describe(call.grad_outputs, "grad_outputs", mixed ? kF32 : first,
           shape.with(of_parts, shape.head_size), !(flags & 16));
  describe(call.grad_lses, "grad_lses", of_lse, of_parts, !(flags & 32));
  describe(call.grad_sink, "grad_sink", of_lse, rows, flags & 64);
}

}  // namespace

CallOfParts::CallOfParts(const uint8_t* data, size_t size) {
  Bytes bytes(data, size);
  entry = pick(kEntries, bytes.next());
  num_parts = pick(kNumParts, bytes.next());
  if (is_update()) num_parts = 2;
  uint32_t kind = pick(kKinds, bytes.next());
  if (is_backward() && is_fp8(kind)) kind = kF32;
  const uint8_t dtype = bytes.next(), flags = bytes.next(), bases = bytes.next();
  const uint8_t stack = bytes.next(), more = bytes.next();
  message_size = bytes.next(), cut = bytes.next();
  const uint8_t seed = bytes.next(), more_seed = bytes.next(), oddity = bytes.next();
  const Shape shape = read_shape(bytes, num_parts > 20 ? 12 : num_parts > 8 ? 100 : 400);

  is_stack = !is_update() && stack % 4 == 3;
  args.is_stack = is_stack;
  args.stack_dim = static_cast<int32_t>(stack / 4 % (shape.rows.size() + 1));
  args.num_parts = is_stack ? 1 : num_parts;
  args.out_lse_base = update.lse_base = bases % 4 == 1 || (bases % 4 == 2 && bases & 4);
  args.invert_empty = update.invert_empty = bases >> 3 & 1;
  listed.resize(args.num_parts);
  args.parts = listed.data();
  parts.resize(std::min<size_t>(kMostParts, listed.size()));
  describe_parts(*this, bytes, shape, kind, bases, shape.rows.size() == 2 || more % 8 == 1);
  describe_others(*this, shape, kind, flags, dtype);
  if ((bases & 0xf0) == 0xf0) {
    for (Operand* operand : operands()) operand->view.device_type = MERGE_ATTN_STATES_CUDA;
  }

  add_region(regions, kSharedBytes);
  const auto declared = lay_out(*this, bytes);
  if (is_stack && more & 8) lay_on_stack(*this, out, parts[0].output, cut % num_parts);
  if (is_stack && more & 16) lay_on_stack(*this, out_lse, parts[0].lse, cut % num_parts);
  for (int i = 0; i < 3; ++i) apply_fault(*this, bytes);
  for (const auto& [operand, mode] : declared) {
    declare_memory(regions[operand->region], operand->view, mode);
  }
  Random random(seed | more_seed << 8);
  fill(*this, oddity, random);
  for (Region& region : regions) {
    region.before.assign(region.bytes.get(), region.bytes.get() + region.size);
  }
  pass_structs();
}

}  // namespace merge_attn_states::fuzz
