// The validation of many parts: what each operand must be. As in validate.cpp, every sentence names
// the argument, what was expected and what came.
#include <algorithm>
#include <array>
#include <cstddef>
#include <list>
#include <string>

#include "checks.h"
#include "parts_call.h"
#include "struct_size.h"

namespace merge_attn_states {
namespace {

constexpr size_t kSmallestTensor = offsetof(TensorView, memory);
static_assert(sizeof(merge_attn_states_part) ==
              offsetof(merge_attn_states_part, reserved) + sizeof(int32_t));
static_assert(sizeof(merge_attn_states_parts_args) ==
              offsetof(merge_attn_states_parts_args, dependent_launch) + sizeof(int32_t));
static_assert(sizeof(merge_attn_states_update_args) ==
              offsetof(merge_attn_states_update_args, reserved) + sizeof(int32_t));

struct PartOperands {
  Operand output, lse, empty, index;
  Base base;
};

// What both entries bring, by the names that their callers know.
struct Operands {
  Operand out, out_lse, sink, scale;
  std::vector<PartOperands> parts;
  int num_parts = 0;
  int stack_dim = -1;    // of a stack, which is one part with a dimension more
  int state = -1;        // the part that `out` is by definition
  Operand* rows_of;      // whose shape the merge has
  int num_row_dims = 0;  // of the merge
  Base out_base;
  bool has_index = false;

  bool is_stack() const { return stack_dim >= 0; }
  const Operand& reference() const { return *rows_of; }
};

// Structs of other versions, in this library's form, alive as long as the operands.
class Structs {
 public:
  const TensorView* tensor(const TensorView* given, Name name) {
    return given == nullptr ? nullptr : of_this_version(given, name, kSmallestTensor, tensors_);
  }
  const merge_attn_states_part& part(const merge_attn_states_part* given, Name name) {
    return *of_this_version(given, name, sizeof(merge_attn_states_part), parts_);
  }

 private:
  template <class Struct>
  static const Struct* of_this_version(const Struct* given, Name name, size_t smallest,
                                       std::list<Struct>& storage) {
    if (given != nullptr && given->struct_size == sizeof(Struct)) return given;
    return &of_other_version(given, name, smallest, storage.emplace_back());
  }

  std::list<TensorView> tensors_;
  std::list<merge_attn_states_part> parts_;
};

Operand described(Name name, const TensorView* given, bool optional, Structs& structs) {
  Operand operand{.name = name, .view = structs.tensor(given, name)};
  if (operand.given()) {
    check_described(operand);
    operand.address_rank = operand.view->rank;
    if (std::any_of(operand.view->sizes, operand.view->sizes + operand.view->rank,
                    [](int64_t size) { return size < 0; })) {
      refuse(name, [&] { return "expected sizes of 0 or more, got " + operand.sizes(); });
    }
  } else if (!optional) {
    refuse(name, [] { return "expected a tensor, got none"; });
  }
  return operand;
}

Base checked_base(int32_t base, Name name) {
  if (base == MERGE_ATTN_STATES_BASE_E) return Base::kE;
  if (base == MERGE_ATTN_STATES_BASE_2) return Base::kTwo;
  refuse(name, [=] { return "expected the base e or 2, got number " + std::to_string(base); });
}

// ---- shapes

using Shape = std::array<int64_t, kMaxRowDims + 2>;

void refuse_shape(const Operand& operand, const int64_t* expected, int rank,
                  const std::string& why) {
  refuse(operand.name, [&] {
    return "expected shape " + list(expected, rank) + " = " + why + ", got " + operand.sizes();
  });
}

bool has_sizes(const Operand& operand, const int64_t* sizes, int rank) {
  return std::equal(sizes, sizes + rank, operand.view->sizes);
}

// An LSE or a mask of an output: its shape without the last dimension, or with 1 in its place.
void check_per_row(Operand& operand, const Operand& output) {
  const int rank = output.view->rank - 1;
  const bool has_one_more = operand.view->rank == rank + 1 && operand.size(rank) == 1;
  if (!(operand.view->rank == rank || has_one_more) ||
      !has_sizes(operand, output.view->sizes, rank)) {
    refuse_shape(operand, output.view->sizes, rank, output.name.str() + ".shape[:-1]");
  }
  operand.address_rank = rank;
}

void check_index(const Operand& index, const Operands& operands) {
  if (operands.num_row_dims != 2) {
    refuse(index.name, [&] {
      return "expected none for outputs of " + std::to_string(operands.num_row_dims + 1) +
             " dimensions, since an index counts along the first of [num_tokens, num_heads, "
             "head_size], got a tensor";
    });
  }
  if (index.view->rank != 1) {
    refuse(index.name, [&] { return "expected one dimension, got shape " + index.sizes(); });
  }
}

// The shape of the merge: that of the first output, with its index, or of the block.
Shape shape_of_rows(const Operands& operands, std::string* where) {
  Shape shape{};
  const Operand& of = operands.reference();
  const Operand& index = operands.parts[0].index;
  int rank = 0;
  for (int i = 0; i < of.view->rank; ++i) {
    if (i != operands.stack_dim) shape[rank++] = of.size(i);
  }
  const bool is_gathered = operands.state < 0 && index.given();
  if (is_gathered) shape[0] = index.size(0);
  if (where != nullptr) {
    const std::string name = of.name.str();
    *where = is_gathered ? index.name.str() + ".shape + " + name + ".shape[1:]"
             : operands.is_stack()
                 ? name + ".shape without dimension " + std::to_string(operands.stack_dim)
                 : name + ".shape";
  }
  return shape;
}

void check_rows(const Operand& output, const Shape& shape, int rank, bool any_rows,
                const Operands& operands) {
  const int first = any_rows ? 1 : 0;
  const bool fits =
      output.view->rank == rank &&
      std::equal(shape.data() + first, shape.data() + rank, output.view->sizes + first);
  if (fits) return;
  std::string where;
  Shape expected = shape_of_rows(operands, &where);
  if (any_rows && output.view->rank > 0) expected[0] = output.size(0);
  refuse_shape(
      output, expected.data(), rank,
      any_rows ? "any number of rows like those of " + operands.reference().name.str() : where);
}

void check_shapes(Operands& operands) {
  const Operand& reference = operands.reference();
  const int rank = reference.view->rank - operands.is_stack();
  operands.num_row_dims = rank - 1;
  if (rank < 2 || rank > kMaxRowDims + 1) {
    refuse(reference.name, [&] {
      const int more = operands.is_stack();
      return "expected " + std::to_string(2 + more) + " to " +
             std::to_string(kMaxRowDims + 1 + more) +
             (more ? " dimensions [*rows, head_size] and one of the parts, got shape "
                   : " dimensions [*rows, head_size], got shape ") +
             reference.sizes();
    });
  }
  for (const PartOperands& part : operands.parts) {
    if (part.index.given()) check_index(part.index, operands);
    operands.has_index |= part.index.given();
  }
  const Shape shape = shape_of_rows(operands, nullptr);
  for (PartOperands& part : operands.parts) {
    if (!operands.is_stack()) check_rows(part.output, shape, rank, part.index.given(), operands);
    if (part.index.given() && part.index.size(0) != shape[0]) {
      std::string where;
      shape_of_rows(operands, &where);
      refuse_shape(part.index, shape.data(), 1, "the rows of " + where);
    }
    check_per_row(part.lse, part.output);
    if (part.empty.given()) check_per_row(part.empty, part.output);
  }
  if (operands.state < 0) {
    check_rows(operands.out, shape, rank, false, operands);
    if (operands.out_lse.given()) check_per_row(operands.out_lse, operands.out);
  }
  if (operands.sink.given() &&
      (operands.sink.view->rank != 1 || operands.sink.size(0) != shape[rank - 2])) {
    refuse_shape(operands.sink, &shape[rank - 2], 1, "the last row dimension");
  }
  if (operands.scale.given()) check_one_element(operands.scale);
  operands.scale.address_rank = 0;
}

// ---- devices and dtypes

template <class F>
void for_each_input(Operands& operands, F&& f) {
  for (PartOperands& part : operands.parts) {
    for (Operand* operand : {&part.output, &part.lse, &part.empty, &part.index}) {
      if (operand->given()) f(*operand);
    }
  }
  if (operands.sink.given()) f(operands.sink);
  if (operands.scale.given()) f(operands.scale);
}

void check_devices(Operands& operands) {
  const Operand& reference = operands.reference();
  check_device_kind(reference);
  const auto check = [&](const Operand& operand) {
    check_device(operand, *reference.view, reference.name);
  };
  check(operands.out);
  if (operands.out_lse.given()) check(operands.out_lse);
  for_each_input(operands, check);
}

void check_part_dtypes(const Operands& operands) {
  const Operand& first = operands.parts[0].output;
  for (const PartOperands& part : operands.parts) {
    check_supported(part.output);
    const DType dtype = part.output.dtype();
    if (dtype == first.dtype() || (is_float(dtype) && is_float(first.dtype()))) continue;
    refuse(part.output.name, [&] {
      const std::string of_first = dtype_name(first.view->dtype);
      return "expected " +
             (is_float(first.dtype())
                  ? "float32, float16 or bfloat16, since " + first.name.str() + " is " + of_first
                  : of_first + ", the dtype of " + first.name.str()) +
             ", got " + dtype_name(part.output.view->dtype);
    });
  }
}

void check_out_dtype(const Operands& operands) {
  const Operand &out = operands.out, &scale = operands.scale, &first = operands.parts[0].output;
  const bool wide_parts = is_float(first.dtype()), fp8_out = is_fp8(out.dtype());
  const bool fits = out.dtype() == first.dtype() || is_float(out.dtype()) || fp8_out;
  const bool of_same_kind = first.dtype() == DType::kFloat64 || out.dtype() == DType::kFloat64 ||
                            (is_fp8(first.dtype()) && fp8_out);
  if (!is_supported(out.dtype()) || !fits || (of_same_kind && out.dtype() != first.dtype())) {
    refuse(out.name, [&] {
      const std::string same = dtype_name(first.view->dtype);
      return "expected " +
             (first.dtype() == DType::kFloat64 ? same
              : wide_parts ? "float32, float16, bfloat16 (or, with out_scale, an FP8 dtype)"
                           : same + ", float32, float16 or bfloat16") +
             " of " + same + " parts, got " + dtype_name(out.view->dtype);
    });
  }
  if (fp8_out && wide_parts && !scale.given()) {
    refuse(scale.name, [&] {
      return "expected one float32 for a " + dtype_name(out.view->dtype) + " result of " +
             dtype_name(first.view->dtype) + " parts, got none";
    });
  }
  if (scale.given() && !fp8_out) {
    refuse(scale.name, [&] {
      return "expected none for a " + dtype_name(out.view->dtype) +
             " result, since only an FP8 one is scaled, got a tensor";
    });
  }
  if (scale.given()) check_dtype(scale, DType::kFloat32, "the dtype of a scale");
}

void check_dtypes(const Operands& operands) {
  check_part_dtypes(operands);
  check_out_dtype(operands);
  const bool wide = operands.parts[0].output.dtype() == DType::kFloat64;
  const auto check_lse = [=](const Operand& lse) {
    check_dtype(lse, wide ? DType::kFloat64 : DType::kFloat32,
                wide ? "the dtype of an LSE of float64 outputs" : "the dtype of every LSE");
  };
  for (const PartOperands& part : operands.parts) {
    check_lse(part.lse);
    if (part.empty.given() && part.empty.view->dtype != MERGE_ATTN_STATES_BOOL) {
      refuse(part.empty.name,
             [&] { return "expected bool, got " + dtype_name(part.empty.view->dtype); });
    }
    if (part.index.given() && part.index.view->dtype != MERGE_ATTN_STATES_INT32 &&
        part.index.view->dtype != MERGE_ATTN_STATES_INT64) {
      refuse(part.index.name,
             [&] { return "expected int32 or int64, got " + dtype_name(part.index.view->dtype); });
    }
  }
  if (operands.out_lse.given()) check_lse(operands.out_lse);
  if (const Operand& sink = operands.sink; sink.given()) {
    if (wide) return check_dtype(sink, DType::kFloat64, "the dtype of a sink of float64 outputs");
    if (!is_float(sink.dtype())) {
      refuse(sink.name, [&] {
        return "expected float32, float16 or bfloat16, got " + dtype_name(sink.view->dtype);
      });
    }
  }
}

// ---- memory

// One part of a stack, as an operand of its own.
struct Slice {
  Slice(const Operand& stack, int dim, int64_t part) : view(*stack.view) {
    int rank = 0;
    for (int i = 0; i < stack.address_rank; ++i) {
      if (i == dim) continue;
      sizes[rank] = stack.view->sizes[i];
      strides[rank++] = stack.view->strides[i];
    }
    const int64_t bytes = part * stack.view->strides[dim] * size_of(stack.dtype());
    view.data = static_cast<char*>(view.data) + bytes;
    view.sizes = sizes.data();
    view.strides = strides.data();
    view.rank = rank;
    operand = {.name = stack.name, .address_rank = rank, .view = &view};
    check_memory(operand, rank);
  }
  Slice(const Slice&) = delete;

  Shape sizes{}, strides{};
  TensorView view;
  Operand operand;
};

// Exactly one part is a legal place for a result: each element is read and written by one thread.
void check_beside_part(const Operand& written, const Operand& part, bool may_be_same,
                       const Operands& operands) {
  if (!written.extent.overlaps_range(part.extent)) return;
  if (!operands.is_stack()) return check_sharing(written, part, may_be_same);
  for (int k = 0; k < operands.num_parts; ++k) {
    const Slice slice(part, operands.stack_dim, k);
    check_overlap(written, slice.operand, may_be_same);
  }
}

void check_memory_and_overlap(Operands& operands) {
  check_memory(operands.out, operands.out.address_rank);
  if (operands.out_lse.given()) check_memory(operands.out_lse, operands.out_lse.address_rank);
  for_each_input(operands, [](Operand& operand) { check_memory(operand, operand.address_rank); });

  for (const Operand* written : {&operands.out, &operands.out_lse}) {
    if (!written->given()) continue;
    check_written_once(*written, written->address_rank);
    for (int k = 0; k < static_cast<int>(operands.parts.size()); ++k) {
      const PartOperands& part = operands.parts[k];
      const bool is_state = k == operands.state;
      const bool may_be_same = !part.index.given() && !operands.has_index;
      const bool is_out = written == &operands.out;
      if (!is_state) {
        check_beside_part(*written, part.output, may_be_same && is_out, operands);
        check_beside_part(*written, part.lse, may_be_same && !is_out, operands);
      }
      for (const Operand* other : {&part.empty, &part.index})
        check_overlap(*written, *other, false);
    }
    check_overlap(*written, operands.sink, false);
    check_overlap(*written, operands.scale, false);
  }
  check_overlap(operands.out, operands.out_lse, false);
}

// Only where memory can be read: what is found on a GPU counts as absent there.
void check_index_values(const Operand& index, int64_t num_rows) {
  if (!index.given() || index.view->device_type != MERGE_ATTN_STATES_CPU) return;
  const TensorView& view = *index.view;
  for (int64_t i = 0; i < view.sizes[0]; ++i) {
    const int64_t at = i * index.stride(0);
    const int64_t row = view.dtype == MERGE_ATTN_STATES_INT64
                            ? static_cast<const int64_t*>(view.data)[at]
                            : static_cast<const int32_t*>(view.data)[at];
    if (row >= -1 && row < num_rows) continue;
    refuse(index.name, [=] {
      return "expected rows in [0, " + std::to_string(num_rows) + ") or -1, got " +
             std::to_string(row) + " at " + std::to_string(i);
    });
  }
}

void check_number_of_parts(const Operands& operands, bool are_alike) {
  const int limit = are_alike ? kMaxAlikeParts : kMaxParts;
  if (operands.num_parts <= limit) return;
  refuse(operands.parts[0].output.name.text, [&] {
    return "expected at most " + std::to_string(limit) + " parts" +
           (are_alike ? ""
                      : " that differ in dtype, base or strides or have an index or a mask (and " +
                            std::to_string(kMaxAlikeParts) + " that do not)") +
           ", got " + std::to_string(operands.num_parts);
  });
}

void check(Operands& operands) {
  check_shapes(operands);
  check_devices(operands);
  check_dtypes(operands);
  check_memory_and_overlap(operands);
  for (const PartOperands& part : operands.parts) {
    check_index_values(part.index, part.output.size(0));
  }
}

// ---- the call

// Without an element there is no address to compute, whatever the strides.
PerRow per_row(const Operand& operand, int num_row_dims, int without = -1) {
  PerRow result;
  if (!operand.given()) return result;
  result.data = operand.view->data;
  if (operand.extent.empty()) return result;
  for (int i = 0, dim = 0; dim < num_row_dims; ++i) {
    if (i != without) result.strides[dim++] = operand.stride(i);
  }
  return result;
}

int64_t last_stride(const Operand& output) {
  return output.extent.empty() ? 1 : output.stride(output.view->rank - 1);
}

Part part_of(const PartOperands& part, const Operands& operands) {
  const int dims = operands.num_row_dims;
  Part result{.output = per_row(part.output, dims, operands.stack_dim),
              .element_stride = last_stride(part.output),
              .lse = per_row(part.lse, dims, operands.stack_dim),
              .empty = per_row(part.empty, dims),
              .index = {},
              .dtype = part.output.dtype(),
              .base = part.base,
              .index_is_64_bit = false};
  if (part.index.given()) {
    result.index = {.data = part.index.view->data,
                    .stride = part.index.stride(0),
                    .num_rows = part.output.size(0)};
    result.index_is_64_bit = part.index.view->dtype == MERGE_ATTN_STATES_INT64;
  }
  return result;
}

bool are_alike(const Part& a, const Part& b) {
  const auto same_strides = [](const PerRow& x, const PerRow& y) {
    return std::equal(x.strides, x.strides + kMaxRowDims, y.strides);
  };
  return a.dtype == b.dtype && a.base == b.base && a.element_stride == b.element_stride &&
         same_strides(a.output, b.output) && same_strides(a.lse, b.lse);
}

template <class F>
void for_each_per_row(PartsCall& call, F&& f) {
  f(call.out);
  f(call.out_lse);
  f(call.sink);
  for (Part& part : call.parts) {
    f(part.output);
    f(part.lse);
    f(part.empty);
  }
}

// One dimension for two that continue each other in every operand, the outer one at `dim`.
bool join_with_next(PartsCall& call, int dim) {
  bool continues = true;
  const int64_t outer = call.sizes[dim], inner = call.sizes[dim + 1];
  if (outer != 1 && inner != 1) {
    for_each_per_row(call, [&](const PerRow& operand) {
      continues &= operand.strides[dim] == inner * operand.strides[dim + 1];
    });
  }
  if (!continues) return false;
  call.sizes[dim] = outer * inner;
  std::copy(call.sizes + dim + 2, call.sizes + kMaxRowDims, call.sizes + dim + 1);
  call.sizes[kMaxRowDims - 1] = 1;
  for_each_per_row(call, [&](PerRow& operand) {
    int64_t* strides = operand.strides;
    if (inner != 1) strides[dim] = strides[dim + 1];
    std::copy(strides + dim + 2, strides + kMaxRowDims, strides + dim + 1);
    strides[kMaxRowDims - 1] = 0;
  });
  return true;
}

void join_dimensions(PartsCall& call, const Operands& operands) {
  int last = operands.num_row_dims - 1;
  for (int dim = operands.has_index ? 1 : 0; dim < last;) {
    if (join_with_next(call, dim)) {
      --last;
    } else {
      ++dim;
    }
  }
}

PartsCall call_of(Operands& operands) {
  const Operand &out = operands.out, &sink = operands.sink, &scale = operands.scale;
  const DType first = operands.parts[0].output.dtype();
  PartsCall call{.head_size = out.size(out.view->rank - 1),
                 .num_parts = operands.num_parts,
                 .is_stack = operands.is_stack(),
                 .out = per_row(out, operands.num_row_dims),
                 .out_element_stride = last_stride(out),
                 .out_lse = per_row(operands.out_lse, operands.num_row_dims),
                 .out_scale = scale.given() ? static_cast<const float*>(scale.view->data) : nullptr,
                 .out_dtype = out.dtype(),
                 .acc_dtype = first == DType::kFloat64 ? first : DType::kFloat32,
                 .base = operands.parts[0].base,
                 .out_base = operands.out_base,
                 .device_type = out.view->device_type,
                 .device_index = out.view->device_index};
  const Shape shape = shape_of_rows(operands, nullptr);
  std::fill(call.sizes, call.sizes + kMaxRowDims, 1);
  std::copy(shape.data(), shape.data() + operands.num_row_dims, call.sizes);

  call.parts.reserve(operands.parts.size());
  call.parts_are_alike = !operands.has_index;
  for (const PartOperands& part : operands.parts) {
    call.parts.push_back(part_of(part, operands));
    call.mixes_bases |= part.base != call.base;
    call.parts_are_alike &= !part.empty.given() && are_alike(call.parts.front(), call.parts.back());
  }
  if (call.is_stack) {
    const PartOperands& stack = operands.parts[0];
    call.stack_output_stride =
        stack.output.extent.empty() ? 0 : stack.output.stride(operands.stack_dim);
    call.stack_lse_stride = stack.lse.extent.empty() ? 0 : stack.lse.stride(operands.stack_dim);
  }
  check_number_of_parts(operands, call.parts_are_alike);
  if (sink.given()) {
    call.sink.data = sink.view->data;
    call.sink.strides[operands.num_row_dims - 1] = sink.extent.empty() ? 0 : sink.stride(0);
    call.sink_dtype = sink.dtype();
    call.mixes_bases |= call.base != call.out_base;
  }
  if (call.mixes_bases) call.base = Base::kE;
  if (operands.state >= 0) {
    call.out_index = call.parts[operands.state].index;
    call.out_index_is_64_bit = call.parts[operands.state].index_is_64_bit;
  }
  join_dimensions(call, operands);
  return call;
}

}  // namespace

PartsCall validate(const merge_attn_states_parts_args* given) {
  constexpr size_t kSmallest = sizeof(merge_attn_states_parts_args);
  merge_attn_states_parts_args storage;
  const auto& args = of_this_version(given, "args", kSmallest, storage);
  Structs structs;
  Operands operands;
  operands.num_parts = args.num_parts;
  if (args.num_parts < 1 || args.parts == nullptr) {
    refuse("outputs", [&] {
      return "expected one part or more, got " + std::to_string(std::max(args.num_parts, 0));
    });
  }
  const int listed = args.is_stack ? 1 : args.num_parts;
  if (listed > kMaxAlikeParts) {
    refuse("outputs", [&] {
      return "expected at most " + std::to_string(kMaxAlikeParts) + " parts, got " +
             std::to_string(listed);
    });
  }
  operands.parts.reserve(listed);
  for (int k = 0; k < listed; ++k) {
    const int number = args.is_stack ? -1 : k;
    const merge_attn_states_part& part = structs.part(args.parts[k], {"parts", k});
    if (part.reserved != 0) refuse({"parts", k}, [] { return "expected 0 in reserved fields"; });
    operands.parts.push_back({.output = described({"outputs", number}, part.output, false, structs),
                              .lse = described({"lses", number}, part.lse, false, structs),
                              .empty = described({"empty", number}, part.empty, true, structs),
                              .index = described({"index", number}, part.index, true, structs),
                              .base = checked_base(part.lse_base, {"lse_base", number})});
  }
  operands.rows_of = &operands.parts[0].output;
  if (args.is_stack) {
    const PartOperands& stack = operands.parts[0];
    operands.stack_dim = args.stack_dim;
    if (args.stack_dim < 0 || args.stack_dim > stack.output.view->rank - 2) {
      refuse("dim", [&] {
        return "expected a row dimension of outputs, in [0, " +
               std::to_string(stack.output.view->rank - 2) + "], got " +
               std::to_string(args.stack_dim);
      });
    }
    if (stack.empty.given() || stack.index.given()) {
      refuse(stack.empty.given() ? "empty" : "index",
             [] { return "expected none for a stack, whose parts are alike, got a tensor"; });
    }
    const int64_t count = stack.output.size(args.stack_dim);
    if (count < 1 || count > kMaxAlikeParts) {
      refuse("outputs", [&] {
        return "expected 1 to " + std::to_string(kMaxAlikeParts) + " parts along dimension " +
               std::to_string(args.stack_dim) + ", got shape " + stack.output.sizes();
      });
    }
    operands.num_parts = static_cast<int>(count);
  }
  operands.out = described("out", args.out, false, structs);
  operands.out_lse = described("out_lse", args.out_lse, true, structs);
  operands.sink = described("sink", args.sink, true, structs);
  operands.scale = described("out_scale", args.out_scale, true, structs);
  operands.out_base = checked_base(args.out_lse_base, "out_lse_base");
  check(operands);
  PartsCall call = call_of(operands);
  call.invert_empty = args.invert_empty != 0;
  call.dependent_launch = args.dependent_launch != 0;
  call.stream = args.stream;
  return call;
}

PartsCall validate(const merge_attn_states_update_args* given) {
  constexpr size_t kSmallest = sizeof(merge_attn_states_update_args);
  merge_attn_states_update_args storage;
  const auto& args = of_this_version(given, "args", kSmallest, storage);
  if (args.reserved != 0) refuse("args", [] { return "expected 0 in reserved fields"; });
  Structs structs;
  Operands operands;
  operands.num_parts = 2;
  operands.state = 0;
  operands.out_base = checked_base(args.lse_base, "lse_base");
  operands.parts = {{.output = described("out", args.out, false, structs),
                     .lse = described("lse", args.lse, false, structs),
                     .index = described("index", args.index, true, structs),
                     .base = operands.out_base},
                    {.output = described("block_out", args.block_out, false, structs),
                     .lse = described("block_lse", args.block_lse, false, structs),
                     .empty = described("empty", args.empty, true, structs),
                     .base = operands.out_base}};
  operands.rows_of = &operands.parts[1].output;
  operands.out = operands.parts[0].output;
  operands.out_lse = operands.parts[0].lse;
  check(operands);
  PartsCall call = call_of(operands);
  call.invert_empty = args.invert_empty != 0;
  call.dependent_launch = args.dependent_launch != 0;
  call.stream = args.stream;
  return call;
}

std::optional<MergeCall> as_pair(const PartsCall& call) {
  const Part &prefix = call.part(0), &suffix = call.part(call.num_parts - 1);
  const auto is_plain = [](const Part& part) {
    return part.index.data == nullptr && part.empty.data == nullptr;
  };
  const bool is_natural = call.base == Base::kE && call.out_base == Base::kE && !call.mixes_bases;
  if (call.num_parts != 2 || !is_natural || call.sink.data != nullptr ||
      prefix.dtype != suffix.dtype || !is_plain(prefix) || !is_plain(suffix) ||
      call.sizes[2] != 1 || call.sizes[3] != 1 ||
      (prefix.dtype != call.out_dtype && !can_convert(prefix.dtype, call.out_dtype))) {
    return std::nullopt;
  }
  const auto rows = [](const PerRow& output, int64_t element_stride) -> Rows {
    return {.data = output.data,
            .token_stride = output.strides[0],
            .head_stride = output.strides[1],
            .element_stride = element_stride};
  };
  const auto lses = [](const PerRow& lse) -> Lses {
    return {.data = lse.data, .token_stride = lse.strides[0], .head_stride = lse.strides[1]};
  };
  const auto state = [&](const Part& part) -> State {
    return {rows(part.output, part.element_stride), lses(part.lse)};
  };
  MergeCall pair{.geometry = {call.sizes[0], call.sizes[1], call.head_size},
                 .parts = {state(prefix), state(suffix)},
                 .merged = {rows(call.out, call.out_element_stride), lses(call.out_lse)},
                 .rule = {.num_tokens_with_context = call.sizes[0], .output_scale = call.out_scale},
                 .input_dtype = prefix.dtype,
                 .output_dtype = call.out_dtype,
                 .output_is_suffix = false,
                 .output_lse_is_suffix = false,
                 .device_type = call.device_type,
                 .device_index = call.device_index,
                 .dependent_launch = call.dependent_launch,
                 .stream = call.stream};
  if (call.is_stack) {
    const auto advance = [](void*& data, int64_t bytes) {
      data = static_cast<char*>(data) + bytes;
    };
    State& second = pair.parts.suffix;
    advance(second.output.data, call.stack_output_stride * size_of(prefix.dtype));
    advance(second.lse.data, call.stack_lse_stride * size_of(call.acc_dtype));
  }
  return pair;
}

}  // namespace merge_attn_states
