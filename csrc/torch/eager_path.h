// What every eager call has in common: the questions before it, its tensors, and its end. Which
// arguments it has is the business of eager.cpp, eager_states.cpp and eager_ranks.cpp.
#pragma once

#include <Python.h>

#include <array>
#include <string>

#include "python_tensor.h"
#include "thread_state.h"

namespace merge_attn_states {

class EagerPath {
 public:
  // Once, when the module is imported.
  void find();
  const std::string& why_not() const { return why_not_; }

  // kWatched where there is no such path, too.
  ThreadState ask() const {
    return why_not_.empty() ? thread_questions_.ask() : ThreadState::kWatched;
  }

  // False where torch.ops has to answer.
  bool describe(PyObject* object, bool written, ThreadState state, TensorView& view,
                HeldTensor& held) const {
    return python_tensors_.describe(object, written, state == ThreadState::kGrad, view, held);
  }

  // Whether the stream of `out` is found; where not, torch.ops says so.
  static bool find_stream(const TensorView& out, void*& stream);

  // Calls the C entry without the interpreter's lock: True where it merged, False where this build
  // cannot and nothing happened, null with the op's error.
  template <class Merge>
  PyObject* run(ThreadState state, PyObject* const* written, Py_ssize_t count,
                const Merge& merge) const {
    char message[1024];
    merge_attn_states_status status;
    // A launch waits where the stream's queue is full, and what it waits for may want the lock: a
    // host function of Python's in that stream.
    Py_BEGIN_ALLOW_THREADS;
    status = merge(message, sizeof(message));
    Py_END_ALLOW_THREADS;
    return end(status, message, state, written, count);
  }

 private:
  PyObject* end(merge_attn_states_status status, const char* message, ThreadState state,
                PyObject* const* written, Py_ssize_t count) const;

  std::string why_not_;
  ThreadQuestions thread_questions_;
  PythonTensors python_tensors_;
};

// The module's one.
extern EagerPath eager_path;

// The views of a call, alive as long as the structs that point at them.
template <int kMost>
class Views {
 public:
  explicit Views(ThreadState state) : state_(state) {}

  // Of an operand that may be None; false where torch.ops has to answer.
  bool describe(PyObject* object, bool written, const TensorView*& view) {
    view = nullptr;
    if (object == Py_None) return true;
    TensorView& next = views_[count_];
    HeldTensor& held = held_[count_++];
    if (!eager_path.describe(object, written, state_, next, held)) return false;
    view = &next;
    return true;
  }

 private:
  ThreadState state_;
  int count_ = 0;
  std::array<TensorView, kMost> views_;
  std::array<HeldTensor, kMost> held_;
};

// Takes what merge_states does, and its results: out, out_lse, outputs, lses, dim, index, empty,
// sink, lse_base, out_lse_base, out_scale. And what update_state does: out, lse, block_out,
// block_lse, index, empty, lse_base, and whether to invert empty. Both return as EagerPath::run
// does.
PyObject* merge_states_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count);
PyObject* update_state_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count);
// As merge_ranks of torch.ops, but of `object` its address. What RankMerge says of results it
// has said.
PyObject* merge_ranks_fast(PyObject*, PyObject* const* arguments, Py_ssize_t count);

}  // namespace merge_attn_states
