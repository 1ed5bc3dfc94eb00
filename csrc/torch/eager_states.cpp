// The eager path of many parts: lists of few plain tensors, handed to the C entry.
#include <array>
#include <string_view>

#include "eager_path.h"
#include "lse_bases.h"

namespace merge_attn_states {
namespace {

constexpr int kMostParts = 16;

// Of all parts, and of the results, a sink and a scale.
using PartsViews = Views<4 * kMostParts + 4>;

// A list's elements; false where it is none, or not of so many.
bool items(PyObject* list, Py_ssize_t count, PyObject**& result) {
  if (!PyList_CheckExact(list) || PyList_GET_SIZE(list) != count) return false;
  result = reinterpret_cast<PyListObject*>(list)->ob_item;
  return true;
}

bool text_of(PyObject* object, std::string_view& text) {
  if (!PyUnicode_CheckExact(object)) return false;
  Py_ssize_t size = 0;
  const char* const data = PyUnicode_AsUTF8AndSize(object, &size);
  if (data == nullptr) PyErr_Clear();
  text = {data, data == nullptr ? 0 : static_cast<size_t>(size)};
  return data != nullptr;
}

bool find_bases(PyObject* lse_base, PyObject* out_lse_base, merge_attn_states_part* parts,
                Py_ssize_t count, int32_t& out_base) {
  std::string_view bases, own;
  if (!text_of(lse_base, bases)) return false;
  if (bases.size() != 1 && bases.size() != static_cast<size_t>(count)) return false;
  for (Py_ssize_t k = 0; k < count; ++k) {
    if (!read_base(base_of_part(bases, k), parts[k].lse_base)) return false;
    if (out_lse_base == Py_None && parts[k].lse_base != parts[0].lse_base) return false;
  }
  if (out_lse_base == Py_None) {
    out_base = parts[0].lse_base;
    return true;
  }
  return text_of(out_lse_base, own) && read_base(own, out_base);
}

// The parts' own operands; index and empty may be None.
bool find_parts(PartsViews& views, PyObject* const* lists, merge_attn_states_part* parts,
                Py_ssize_t count) {
  const TensorView* merge_attn_states_part::*const fields[] = {
      &merge_attn_states_part::output, &merge_attn_states_part::lse, &merge_attn_states_part::index,
      &merge_attn_states_part::empty};
  for (int i = 0; i < 4; ++i) {
    if (lists[i] == Py_None) continue;
    PyObject** elements;
    if (!items(lists[i], count, elements)) return false;
    const bool may_be_none = i >= 2;
    for (Py_ssize_t k = 0; k < count; ++k) {
      const TensorView*& view = parts[k].*fields[i];
      if (!views.describe(elements[k], false, view)) return false;
      if (view == nullptr && !may_be_none) return false;
    }
  }
  return true;
}

// A stack's dimension; false where it is no plain int.
bool find_dim(PyObject* dim, merge_attn_states_parts_args& args) {
  if (dim == Py_None) return true;
  if (!PyLong_CheckExact(dim)) return false;
  int overflow = 0;
  const long number = PyLong_AsLongAndOverflow(dim, &overflow);
  args.is_stack = 1;
  args.stack_dim = static_cast<int32_t>(number);
  return overflow == 0 && args.stack_dim == number;
}

}  // namespace

PyObject* merge_states_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 11) Py_RETURN_FALSE;
  const ThreadState state = eager_path.ask();
  if (state == ThreadState::kWatched) Py_RETURN_FALSE;
  PyObject *const out = arguments[0], *const out_lse = arguments[1], *const dim = arguments[4];
  PyObject* const lists[] = {arguments[2], arguments[3], arguments[5], arguments[6]};
  if (out == Py_None || !PyList_CheckExact(lists[0])) Py_RETURN_FALSE;
  const Py_ssize_t num_parts = PyList_GET_SIZE(lists[0]);
  // A stack with an index or a mask a part is not one of the C entry's.
  const bool is_plain_stack = dim == Py_None || (lists[2] == Py_None && lists[3] == Py_None);
  if (num_parts < 1 || num_parts > kMostParts || !is_plain_stack) Py_RETURN_FALSE;

  PartsViews views(state);
  merge_attn_states_part parts[kMostParts];
  const merge_attn_states_part* pointers[kMostParts];
  for (Py_ssize_t k = 0; k < num_parts; ++k) {
    parts[k] = {.struct_size = sizeof(merge_attn_states_part)};
    pointers[k] = &parts[k];
  }
  merge_attn_states_parts_args args{
      .struct_size = sizeof(args), .parts = pointers, .num_parts = static_cast<int32_t>(num_parts)};
  // Results first: see stable_tensor.h.
  const bool are_plain =
      views.describe(out, true, args.out) && views.describe(out_lse, true, args.out_lse) &&
      find_parts(views, lists, parts, num_parts) &&
      views.describe(arguments[7], false, args.sink) &&
      views.describe(arguments[10], false, args.out_scale) &&
      find_bases(arguments[8], arguments[9], parts, num_parts, args.out_lse_base) &&
      find_dim(dim, args) && EagerPath::find_stream(*args.out, args.stream);
  if (!are_plain) Py_RETURN_FALSE;
  PyObject* const written[] = {out, out_lse};
  return eager_path.run(state, written, out_lse == Py_None ? 1 : 2,
                        [&](char* message, size_t size) {
                          return merge_attn_states_merge_parts(&args, message, size);
                        });
}

PyObject* update_state_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count) {
  if (count != 8) Py_RETURN_FALSE;
  const ThreadState state = eager_path.ask();
  if (state == ThreadState::kWatched) Py_RETURN_FALSE;
  PartsViews views(state);
  merge_attn_states_update_args args{.struct_size = sizeof(args),
                                     .invert_empty = arguments[7] == Py_True};
  std::string_view base;
  const bool are_plain = views.describe(arguments[0], true, args.out) &&
                         views.describe(arguments[1], true, args.lse) &&
                         views.describe(arguments[2], false, args.block_out) &&
                         views.describe(arguments[3], false, args.block_lse) &&
                         views.describe(arguments[4], false, args.index) &&
                         views.describe(arguments[5], false, args.empty) &&
                         text_of(arguments[6], base) && read_base(base, args.lse_base) &&
                         args.out != nullptr && args.lse != nullptr && args.block_out != nullptr &&
                         args.block_lse != nullptr &&
                         EagerPath::find_stream(*args.out, args.stream);
  if (!are_plain) Py_RETURN_FALSE;
  return eager_path.run(state, arguments, 2, [&](char* message, size_t size) {
    return merge_attn_states_update(&args, message, size);
  });
}

}  // namespace merge_attn_states
