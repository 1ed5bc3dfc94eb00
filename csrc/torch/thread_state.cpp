#include "thread_state.h"

#include "python_attribute.h"

namespace merge_attn_states {

std::string ThreadQuestions::find() {
  // In the order of Function.
  constexpr std::array<std::array<const char*, 2>, kNumFunctions> kNames = {{
      {"torch._C", "_len_torch_dispatch_stack"},       // FakeTensorMode, make_fx, FlopCounterMode
      {"torch._C", "_len_torch_function_stack"},       // make_fx before dispatch, torch.device(...)
      {"torch._C", "_is_tracing"},                     // torch.jit.trace, which no mode shows
      {"torch._C._functorch", "maybe_current_level"},  // vmap, grad, jvp, functionalize
      {"torch", "is_inference_mode_enabled"},
      {"torch", "is_grad_enabled"},
  }};
  for (int i = 0; i < kNumFunctions; ++i) {
    functions_[i] = attribute(kNames[i][0], kNames[i][1]);
    if (functions_[i] == nullptr) return std::string(kNames[i][0]) + "." + kNames[i][1];
  }
  forward_ad_ = attribute("torch.autograd", "forward_ad");
  level_name_ = PyUnicode_InternFromString("_current_level");
  if (forward_ad_ == nullptr || !PyObject_HasAttr(forward_ad_, level_name_)) {
    return "torch.autograd.forward_ad._current_level";
  }
  return "";
}

bool ThreadQuestions::is_quiet(Function function) const {
  PyObject* const answer = PyObject_CallNoArgs(functions_[function]);
  const int truth = answer != nullptr ? PyObject_IsTrue(answer) : -1;
  Py_XDECREF(answer);
  if (truth < 0) PyErr_Clear();
  return truth == 0;
}

bool ThreadQuestions::has_dual_level() const {
  PyObject* const level = PyObject_GetAttr(forward_ad_, level_name_);
  const long number = level != nullptr ? PyLong_AsLong(level) : 0;  // -1: none
  Py_XDECREF(level);
  if (PyErr_Occurred() != nullptr) PyErr_Clear();
  return number != -1;
}

ThreadState ThreadQuestions::ask() const {
  for (const Function function : {kDispatchModes, kFunctionModes, kTracing, kTransforms}) {
    if (!is_quiet(function)) return ThreadState::kWatched;
  }
  // Nothing records a gradient or a tangent there, whatever else is switched on.
  if (!is_quiet(kInferenceMode)) return ThreadState::kInference;
  if (has_dual_level()) return ThreadState::kWatched;
  return is_quiet(kGradMode) ? ThreadState::kNoGrad : ThreadState::kGrad;
}

}  // namespace merge_attn_states
