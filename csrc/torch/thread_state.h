// What PyTorch answers about the thread that calls, by functions that it offers to Python: whether
// something stands between a call and its kernel that has to see it, and what autograd wants.
// Knows nothing of a tensor or of the operation.
#pragma once

#include <Python.h>

#include <array>
#include <string>

namespace merge_attn_states {

enum class ThreadState {
  kWatched,    // a mode, a trace or a transform has to see the call
  kInference,  // nothing is recorded, and no version counter raised
  kNoGrad,
  kGrad,  // an operand may require grad
};

// Python gives its own name to this only from 3.13 on.
using FastCFunction = PyObject* (*)(PyObject* self, PyObject* const* args, Py_ssize_t count,
                                    PyObject* names);

class ThreadQuestions {
 public:
  // Empty, or the function that this PyTorch lacks. Called once, and creates nothing of PyTorch's:
  // whoever imports the module may be inside any mode.
  std::string find();

  // Needs the interpreter's lock, and leaves no Python error behind.
  ThreadState ask() const;

 private:
  enum Question {
    kDispatchModes,
    kFunctionModes,
    kTracing,
    kTransforms,
    kInferenceMode,
    kGradMode,
    kNumQuestions
  };

  // A builtin is called as the C function that it is: Python's own way there costs as much as most
  // answers.
  struct Function {
    PyObject* object = nullptr;
    PyObject* self = nullptr;          // the builtin's
    PyCFunction no_args = nullptr;     // METH_NOARGS; else null
    FastCFunction fastcall = nullptr;  // METH_FASTCALL | METH_KEYWORDS; else null

    PyObject* call() const;
  };

  enum Answer {
    kNo,  // false, 0 or None, as it is where nothing is going on
    kYes,
    kFailed,
  };

  static Function function(PyObject* object);
  Answer answer(Question question) const;
  Answer has_dual_level() const;

  std::array<Function, kNumQuestions> functions_{};
  PyObject* forward_ad_ = nullptr;  // the module, which keeps its level as a global
  PyObject* level_name_ = nullptr;
};

}  // namespace merge_attn_states
