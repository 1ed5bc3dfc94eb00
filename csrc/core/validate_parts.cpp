// The validation of many parts: what each operand must be. As in validate.cpp, every sentence names
// the argument, what was expected and what came.
#include <algorithm>
#include <array>
#include <string>

#include "part_operands.h"
#include "stack.h"

namespace merge_attn_states {

Shape shape_of_rows(const PartsOperands& operands, std::string* where) {
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

void check_out_dtype(Name name, DType out, DType parts, bool has_scale) {
  constexpr Name kScale = "out_scale";
  const auto text = [](DType dtype) { return dtype_name(static_cast<uint32_t>(dtype)); };
  const bool wide_parts = is_float(parts), fp8_out = is_fp8(out);
  const bool fits = is_supported(out) && (out == parts || is_float(out) || fp8_out);
  const bool of_same_kind =
      parts == DType::kFloat64 || out == DType::kFloat64 || (is_fp8(parts) && fp8_out);
  if (!fits || (of_same_kind && out != parts)) {
    refuse(name, [&] {
      return "expected " +
             (parts == DType::kFloat64 ? text(parts)
              : wide_parts ? "float32, float16, bfloat16 (or, with out_scale, an FP8 dtype)"
                           : text(parts) + ", float32, float16 or bfloat16") +
             " of " + text(parts) + " parts, got " + text(out);
    });
  }
  if (fp8_out && wide_parts && !has_scale) {
    refuse(kScale, [&] {
      return "expected one float32 for a " + text(out) + " result of " + text(parts) +
             " parts, got none";
    });
  }
  if (has_scale && !fp8_out) {
    refuse(kScale, [&] {
      return "expected none for a " + text(out) +
             " result, since only an FP8 one is scaled, got a tensor";
    });
  }
}

namespace {

// ---- shapes

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

void check_index(const Operand& index, const PartsOperands& operands) {
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

void check_rows(const Operand& output, const Shape& shape, int rank, bool any_rows,
                const PartsOperands& operands) {
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

void check_shapes(PartsOperands& operands) {
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
  if (operands.state < 0) check_rows(operands.out, shape, rank, false, operands);
  if (operands.out_lse.given()) check_per_row(operands.out_lse, operands.out);
  if (operands.sink.given() &&
      (operands.sink.view->rank != 1 || operands.sink.size(0) != shape[rank - 2])) {
    refuse_shape(operands.sink, &shape[rank - 2], 1, "the last row dimension");
  }
  if (operands.scale.given()) check_one_element(operands.scale);
  operands.scale.address_rank = 0;
}

// ---- devices and dtypes

template <class F>
void for_each_input(PartsOperands& operands, F&& f) {
  for (PartOperands& part : operands.parts) {
    for (Operand* operand : {&part.output, &part.lse, &part.empty, &part.index}) {
      if (operand->given()) f(*operand);
    }
  }
  if (operands.sink.given()) f(operands.sink);
  if (operands.scale.given()) f(operands.scale);
}

void check_devices(PartsOperands& operands) {
  const Operand& reference = operands.state < 0 ? operands.reference() : operands.out;
  check_device_kind(reference);
  const auto check = [&](const Operand& operand) {
    check_device(operand, *reference.view, reference.name);
  };
  for_each_input(operands, check);  // before the results, which may have been made like them
  check(operands.out);
  if (operands.out_lse.given()) check(operands.out_lse);
}

void check_part_dtypes(const PartsOperands& operands) {
  const Operand& first = operands.parts[0].output;
  for (const PartOperands& part : operands.parts) {
    check_supported(part.output);
    if (operands.is_backward && is_fp8(part.output.dtype())) {
      refuse(part.output.name, [&] {
        return "expected a dtype that has gradients, got " + dtype_name(part.output.view->dtype);
      });
    }
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

// Of a merge's output, whose parts have gradients.
void check_gradient_dtype(const Operand& gradient, DType parts) {
  const bool wide = parts == DType::kFloat64;
  if (wide ? gradient.dtype() == parts : is_float(gradient.dtype())) return;
  refuse(gradient.name, [&] {
    return std::string("expected ") + (wide ? "float64" : "float32, float16 or bfloat16") + " of " +
           dtype_name(static_cast<uint32_t>(parts)) + " parts, got " +
           dtype_name(gradient.view->dtype);
  });
}

void check_dtypes(const PartsOperands& operands) {
  check_part_dtypes(operands);
  const Operand &out = operands.out, &scale = operands.scale;
  const DType parts = operands.parts[0].output.dtype();
  if (operands.is_backward) {
    check_gradient_dtype(out, parts);
  } else {
    check_out_dtype(out.name, out.dtype(), parts, scale.given());
  }
  if (scale.given()) check_dtype(scale, DType::kFloat32, "the dtype of a scale");
  const bool wide = parts == DType::kFloat64;
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

// Exactly one part is a legal place for a result: each element is read and written by one thread.
void check_beside_part(const Operand& written, const Operand& part, bool may_be_same,
                       const PartsOperands& operands) {
  if (!written.extent.overlaps_range(part.extent)) return;
  if (!operands.is_stack()) return check_sharing(written, part, may_be_same);
  TensorView stack = *part.view;
  stack.rank = part.address_rank;
  int64_t layout[2 * (kMaxRowDims + 1)];
  const PartsOfStack parts(stack, operands.stack_dim, layout);
  for (int k = 0; k < operands.num_parts; ++k) {
    const TensorView view = parts[k];
    Operand alone{.name = part.name, .address_rank = view.rank, .view = &view};
    check_memory(alone, view.rank);
    check_overlap(written, alone, may_be_same);
  }
}

void check_memory_of_all(PartsOperands& operands) {
  check_memory(operands.out, operands.out.address_rank);
  if (operands.out_lse.given()) check_memory(operands.out_lse, operands.out_lse.address_rank);
  for_each_input(operands, [](Operand& operand) { check_memory(operand, operand.address_rank); });
}

void check_overlap_of_results(PartsOperands& operands) {
  for (const Operand* written : {&operands.out, &operands.out_lse}) {
    if (!written->given()) continue;
    check_written_once(*written, written->address_rank);
    for (int k = 0; k < static_cast<int>(operands.parts.size()); ++k) {
      const PartOperands& part = operands.parts[k];
      const bool is_state = k == operands.state;
      const bool may_be_same = !operands.has_index;
      const bool is_out = written == &operands.out;
      if (!is_state) {
        check_beside_part(*written, part.output, may_be_same && is_out, operands);
        check_beside_part(*written, part.lse, may_be_same && !is_out, operands);
      }
      check_overlap(*written, part.empty, false);
      check_overlap(*written, part.index, false);
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

// The results of a backward call: rows in their order, of all parts one behind the other.
void check_gradients(PartsOperands& operands) {
  const Shape rows = shape_of_rows(operands, nullptr);
  Shape shape{operands.num_parts};
  std::copy(rows.data(), rows.data() + operands.num_row_dims + 1, shape.data() + 1);
  const bool wide = operands.parts[0].output.dtype() == DType::kFloat64;
  const DType narrow = wide ? DType::kFloat64 : DType::kFloat32;
  const auto check = [&](Operand& gradient, int64_t* sizes, int rank, const char* why) {
    if (!gradient.given()) return;
    if (gradient.view->rank != rank || !has_sizes(gradient, sizes, rank)) {
      refuse_shape(gradient, sizes, rank, why);
    }
    const bool has_elements = std::find(sizes, sizes + rank, 0) == sizes + rank;
    uint64_t stride = 1;  // wraps where the memory, which is checked below, cannot be
    for (int i = rank - 1; has_elements && i >= 0; --i) {
      if (gradient.size(i) != 1 && static_cast<uint64_t>(gradient.view->strides[i]) != stride) {
        refuse(gradient.name,
               [&] { return "expected a contiguous tensor, got " + gradient.layout(); });
      }
      stride *= static_cast<uint64_t>(gradient.size(i));
    }
    check_device(gradient, *operands.reference().view, operands.reference().name);
    check_memory(gradient, rank);
  };
  check(operands.grad_outputs, shape.data(), operands.num_row_dims + 2,
        "the parts and the shape of grad_out");
  check(operands.grad_lses, shape.data(), operands.num_row_dims + 1,
        "the parts and the rows of grad_out");
  check(operands.grad_sink, shape.data() + 1, operands.num_row_dims, "the rows of grad_out");
  if (operands.grad_outputs.given()) {
    const DType first = operands.parts[0].output.dtype();
    const bool are_mixed =
        std::any_of(operands.parts.begin(), operands.parts.end(),
                    [&](const PartOperands& part) { return part.output.dtype() != first; });
    check_dtype(operands.grad_outputs, are_mixed ? DType::kFloat32 : first,
                are_mixed ? "since those of outputs differ" : "the dtype of outputs");
  }
  for (const Operand* gradient : {&operands.grad_lses, &operands.grad_sink}) {
    if (gradient->given()) check_dtype(*gradient, narrow, "the dtype of every LSE");
  }
}

void check_overlap_of_gradients(PartsOperands& operands) {
  const std::array<Operand*, 3> written = {&operands.grad_outputs, &operands.grad_lses,
                                           &operands.grad_sink};
  for (size_t i = 0; i < written.size(); ++i) {
    if (!written[i]->given()) continue;
    check_overlap(*written[i], operands.out, false);
    check_overlap(*written[i], operands.out_lse, false);
    for_each_input(operands, [&](Operand& other) { check_overlap(*written[i], other, false); });
    for (size_t j = 0; j < i; ++j) check_overlap(*written[i], *written[j], false);
  }
}

}  // namespace

void check(PartsOperands& operands) {
  check_shapes(operands);
  check_devices(operands);
  check_dtypes(operands);
  check_memory_of_all(operands);
  if (operands.is_backward) {
    check_gradients(operands);
    check_overlap_of_gradients(operands);
  } else {
    check_overlap_of_results(operands);
  }
  for (const PartOperands& part : operands.parts) {
    check_index_values(part.index, part.output.size(0));
  }
}

}  // namespace merge_attn_states
