#include "thread_state.h"

#include "python_attribute.h"

namespace merge_attn_states {

std::string ThreadQuestions::find() {
  // In the order of Question.
  constexpr std::array<std::array<const char*, 2>, kNumQuestions> kNames = {{
      {"torch._C", "_len_torch_dispatch_stack"},  // FakeTensorMode, make_fx, FlopCounterMode
      {"torch._C", "_len_torch_function_stack"},  // make_fx before dispatch, torch.device(...)
      {"torch._C", "_is_tracing"},                // torch.jit.trace, which no mode shows
      {"torch._C", "_are_functorch_transforms_active"},  // vmap, grad, jvp, functionalize
      {"torch", "is_inference_mode_enabled"},
      {"torch", "is_grad_enabled"},
  }};
  for (int i = 0; i < kNumQuestions; ++i) {
    PyObject* const found = attribute(kNames[i][0], kNames[i][1]);
    if (found == nullptr) return std::string(kNames[i][0]) + "." + kNames[i][1];
    functions_[i] = function(found);
  }
  forward_ad_ = attribute("torch.autograd", "forward_ad");
  level_name_ = PyUnicode_InternFromString("_current_level");
  if (forward_ad_ == nullptr || !PyObject_HasAttr(forward_ad_, level_name_)) {
    return "torch.autograd.forward_ad._current_level";
  }
  return "";
}

ThreadQuestions::Function ThreadQuestions::function(PyObject* object) {
  Function result{.object = object};
  if (!PyCFunction_CheckExact(object)) return result;
  const PyCFunction function = PyCFunction_GetFunction(object);
  result.self = PyCFunction_GetSelf(object);
  switch (PyCFunction_GetFlags(object)) {
    case METH_NOARGS:
      result.no_args = function;
      break;
    case METH_FASTCALL | METH_KEYWORDS:
      result.fastcall = reinterpret_cast<FastCFunction>(reinterpret_cast<void (*)()>(function));
      break;
  }
  return result;
}

PyObject* ThreadQuestions::Function::call() const {
  if (no_args != nullptr) return no_args(self, nullptr);
  if (fastcall != nullptr) return fastcall(self, nullptr, 0, nullptr);
  return PyObject_CallNoArgs(object);
}

ThreadQuestions::Answer ThreadQuestions::answer(Question question) const {
  PyObject* const answer = functions_[question].call();
  if (answer == Py_False || answer == Py_None) {
    Py_DECREF(answer);
    return kNo;
  }
  const int truth = answer != nullptr ? PyObject_IsTrue(answer) : -1;
  Py_XDECREF(answer);
  if (truth < 0) PyErr_Clear();
  return truth < 0 ? kFailed : truth == 0 ? kNo : kYes;
}

ThreadQuestions::Answer ThreadQuestions::has_dual_level() const {
  PyObject* const level = PyObject_GetAttr(forward_ad_, level_name_);
  const long number = level != nullptr ? PyLong_AsLong(level) : -1;  // -1: none, or an error
  Py_XDECREF(level);
  if (PyErr_Occurred() == nullptr) return number == -1 ? kNo : kYes;
  PyErr_Clear();
  return kFailed;
}

// A question that fails may hide anything: the dispatcher then gets the call.
ThreadState ThreadQuestions::ask() const {
  for (const Question question : {kDispatchModes, kFunctionModes, kTracing, kTransforms}) {
    if (answer(question) != kNo) return ThreadState::kWatched;
  }
  const Answer inference = answer(kInferenceMode);
  // Nothing records a gradient or a tangent there, whatever else is switched on.
  if (inference == kYes) return ThreadState::kInference;
  if (inference == kFailed || has_dual_level() != kNo) return ThreadState::kWatched;
  return answer(kGradMode) == kNo ? ThreadState::kNoGrad : ThreadState::kGrad;
}

}  // namespace merge_attn_states
