#include "eager_path.h"

#include <cstdlib>
#include <stdexcept>
#include <string_view>

#include "stable_tensor.h"

namespace merge_attn_states {

EagerPath eager_path;

void EagerPath::find() {
  const char* const wanted = std::getenv("MERGE_ATTN_STATES_FAST_PATH");
  for (const std::string_view off : {"0", "off", "no", "false"}) {
    if (wanted == nullptr || wanted != off) continue;
    why_not_ = std::string("MERGE_ATTN_STATES_FAST_PATH=") + wanted;
    return;
  }
  std::string lacks = thread_questions_.find();
  if (lacks.empty()) lacks = python_tensors_.find();
  if (!lacks.empty()) why_not_ = "this PyTorch has no " + lacks;
}

bool EagerPath::find_stream(const TensorView& out, void*& stream) {
  try {
    stream = current_stream(out);
    return true;
  } catch (const std::runtime_error&) {
    return false;
  }
}

PyObject* EagerPath::end(merge_attn_states_status status, const char* message, ThreadState state,
                         PyObject* const* written, Py_ssize_t count) const {
  if (status == MERGE_ATTN_STATES_OK) {
    // Under no_grad too: what was saved for backward before is overwritten all the same.
    const bool counts = state != ThreadState::kInference;
    if (counts && !python_tensors_.raise_versions(written, count)) return nullptr;
    Py_RETURN_TRUE;
  }
  if (status == MERGE_ATTN_STATES_UNAVAILABLE) Py_RETURN_FALSE;  // nothing was written
  PyErr_SetString(
      status == MERGE_ATTN_STATES_INVALID_ARGUMENT ? PyExc_ValueError : PyExc_RuntimeError,
      message);
  return nullptr;
}

}  // namespace merge_attn_states
