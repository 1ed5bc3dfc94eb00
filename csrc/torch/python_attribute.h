// An attribute of a module that is already imported.
#pragma once

#include <Python.h>

namespace merge_attn_states {

// A new reference, or null without a Python error.
inline PyObject* attribute(const char* module_name, const char* name) {
  PyObject* const module = PyImport_ImportModule(module_name);
  PyObject* const found = module != nullptr ? PyObject_GetAttrString(module, name) : nullptr;
  Py_XDECREF(module);
  if (found == nullptr) PyErr_Clear();
  return found;
}

}  // namespace merge_attn_states
