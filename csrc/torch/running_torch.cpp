// Looks up and proves what running_torch.h offers. Runs once, when the module is imported.
#include "running_torch.h"

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <cstdlib>
#include <stdexcept>
#include <string_view>
#include <system_error>
#include <thread>
#include <utility>
#include <vector>

namespace py = pybind11;

namespace merge_attn_states {
namespace {

py::object torch(const char* name) { return py::module_::import("torch").attr(name); }
py::object torch_c(const char* name) { return torch("_C").attr(name); }

// A Python context manager, entered for a scope.
class With {
 public:
  explicit With(py::object manager) : manager_(std::move(manager)) { manager_.attr("__enter__")(); }
  ~With() {
    try {
      manager_.attr("__exit__")(py::none(), py::none(), py::none());
    } catch (py::error_already_set& error) {
      error.discard_as_unraisable(__func__);
    }
  }
  With(const With&) = delete;
  With& operator=(const With&) = delete;

 private:
  py::object manager_;
};

void expect(bool agrees, const char* what) {
  if (!agrees) throw std::runtime_error(std::string("this PyTorch keeps otherwise: ") + what);
}

template <class F>
void seek_symbol(void* library, const char* name, F& found) {
  found = reinterpret_cast<F>(library != nullptr ? dlsym(library, name) : nullptr);
}

template <class F>
void find_symbol(void* library, const char* name, F& found) {
  seek_symbol(library, name, found);
  if (found == nullptr) {
    throw std::runtime_error(std::string("this PyTorch does not export ") + name);
  }
}

// Plain tensors of one, two and three dimensions, and a view with an offset and other strides.
std::vector<py::object> samples() {
  using namespace py::literals;
  std::vector<py::object> tensors;
  for (const std::vector<int>& sizes : {std::vector{5}, {5, 4}, {5, 4, 3}}) {
    const py::tuple shape(py::cast(sizes));
    tensors.push_back(torch("empty")(shape, "device"_a = "cpu", "dtype"_a = torch("float32")));
  }
  tensors.push_back(tensors.back().attr("transpose")(0, 2)[py::slice(1, 3, 1)]);
  return tensors;
}

}  // namespace

void RunningTorch::find() {
  const char* const wanted = std::getenv("MERGE_ATTN_STATES_FAST_PATH");
  if (wanted != nullptr && std::string_view(wanted) == "0") {
    why_not_ = "MERGE_ATTN_STATES_FAST_PATH=0";  // and nothing of PyTorch has been touched
    return;
  }
  // In a thread of its own, where no mode is on: whoever imports this may be inside inference mode,
  // a FakeTensorMode or torch.func.
  const auto prove = [this] {
    const py::gil_scoped_acquire interpreter;
    try {
      look_up();
      find_handle();
      prove_tensors();
      prove_thread();
      why_not_.clear();
    } catch (const std::exception& error) {  // py::error_already_set is one
      why_not_ = error.what();
    }
  };
  const py::gil_scoped_release released;
  try {
    std::thread(prove).join();
  } catch (const std::system_error& error) {
    why_not_ = std::string("no thread can be started: ") + error.what();
  }
}

void RunningTorch::look_up() {
  const py::object tensor = torch("Tensor");
  tensor_type_ = reinterpret_cast<PyTypeObject*>(tensor.ptr());
  if (!py::hasattr(tensor, "__dlpack_c_exchange_api__")) {
    throw std::runtime_error("this PyTorch offers no DLPack C exchange API");
  }
  const py::object capsule = tensor.attr("__dlpack_c_exchange_api__");
  const void* const table = PyCapsule_GetPointer(capsule.ptr(), "dlpack_exchange_api");
  if (table == nullptr) throw py::error_already_set();
  exchange_ = static_cast<const DLPackExchangeAPI*>(table);
  if (exchange_->header.version.major != DLPACK_MAJOR_VERSION) {
    throw std::runtime_error("this PyTorch offers another version of the DLPack C exchange API");
  }
  libc10_ = dlopen("libc10.so", RTLD_LAZY | RTLD_NOLOAD);
  void* const libtorch = dlopen("libtorch_cpu.so", RTLD_LAZY | RTLD_NOLOAD);
  const void* keys;  // of this thread; every other one has its own
  find_symbol(libc10_, kIncludedKeys, keys);
  find_symbol(libc10_, "_ZNK3c1010TensorImpl13requires_gradEv", requires_grad_);
  seek_symbol(libtorch, "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensor", to_dlpack_);
  seek_symbol(libtorch, "_ZN2at17toDLPackNonOwningERKNS_6TensorEP8DLTensorb", to_dlpack_of_214_);
  find_symbol(libtorch, "_ZN2at6native6is_negERKNS_6TensorE", is_neg_);
  find_symbol(libtorch, "_ZN2at4impl27torch_function_mode_enabledEv", function_mode_enabled_);
  find_symbol(libtorch, "_ZN5torch8autograd4impl12bump_versionERKN2at6TensorE", raise_version_);
  find_symbol(libtorch, "aoti_torch_grad_mode_is_enabled", grad_mode_enabled_);
  find_symbol(libtorch, "aoti_torch_get_storage_size", storage_size_);
  find_symbol(libtorch, "aoti_torch_get_storage_offset", storage_offset_);
}

// A tensor's sizes are a part of it, so the word that holds its address is the only one in its
// Python object that lies at one distance from the sizes in every sample.
void RunningTorch::find_handle() {
  constexpr int64_t kLargestTensor = 1024;  // bytes; some 200 in PyTorch 2.13
  const std::vector<py::object> tensors = samples();
  const auto distance = [&](const py::object& tensor, int64_t offset) {
    DLTensor described;
    if (exchange_->dltensor_from_py_object_no_sync(tensor.ptr(), &described) != 0) {
      throw py::error_already_set();
    }
    const char* const object = reinterpret_cast<const char*>(tensor.ptr());
    return reinterpret_cast<intptr_t>(described.shape) -
           *reinterpret_cast<const intptr_t*>(object + offset);
  };
  int found = 0;
  const int64_t end = tensor_type_->tp_basicsize - static_cast<int64_t>(sizeof(void*));
  for (int64_t offset = sizeof(PyObject); offset <= end; offset += sizeof(void*)) {
    const int64_t first = distance(tensors.front(), offset);
    bool holds = first >= 0 && first < kLargestTensor;
    for (const py::object& tensor : tensors) {
      holds = holds && is_plain_tensor(tensor.ptr()) && distance(tensor, offset) == first;
    }
    if (!holds) continue;
    handle_offset_ = offset;
    ++found;
  }
  expect(found == 1, "the tensor inside a torch.Tensor");
}

void RunningTorch::prove_tensors() const {
  const auto number = [](const py::object& value) { return value.cast<int64_t>(); };
  for (const py::object& tensor : samples()) {
    const TensorHandle here = handle(tensor.ptr());
    DLTensor own{}, known{};
    expect(describe(tensor.ptr(), &own), "a tensor in DLPack's words");
    exchange_->dltensor_from_py_object_no_sync(tensor.ptr(), &known);
    expect(own.data == known.data && own.shape == known.shape && own.strides == known.strides &&
               own.ndim == known.ndim && own.device.device_type == kDLCPU && own.byte_offset == 0 &&
               own.dtype.code == kDLFloat && own.dtype.bits == 32 && own.dtype.lanes == 1,
           "at::toDLPackNonOwning");

    int64_t bytes = 0, offset = 0;
    expect(storage_size(here, &bytes) &&
               bytes == number(tensor.attr("untyped_storage")().attr("nbytes")()),
           "the size of a storage");
    expect(storage_offset(here, &offset) && offset == number(tensor.attr("storage_offset")()),
           "the offset into a storage");

    const int64_t version = number(tensor.attr("_version"));
    raise_version(here);
    expect(number(tensor.attr("_version")) == version + 1, "the version of a tensor");

    const py::object negated = torch("_neg_view")(tensor);
    expect(!is_neg(here) && is_neg(handle(negated.ptr())), "the negative bit");
    const py::object leaf = tensor.attr("detach")();
    expect(!requires_grad(handle(leaf.ptr())), "requires_grad");
    leaf.attr("requires_grad_")();
    expect(requires_grad(handle(leaf.ptr())), "requires_grad");
  }
}

void RunningTorch::prove_thread() {
  const auto known_keys = [] {
    return torch_c("_dispatch_tls_local_include_set")().attr("raw_repr")().cast<uint64_t>();
  };
  // In which keys two states differ, by the word and by what PyTorch says.
  const auto difference = [&](py::object one, py::object other) {
    uint64_t keys, known;
    {
      const With inside(std::move(one));
      keys = included_keys(), known = known_keys();
    }
    const With inside(std::move(other));
    keys ^= included_keys();
    expect(keys != 0 && keys == (known ^ known_keys()), "the dispatch keys of a thread");
    return keys;
  };
  const py::object inference = torch_c("_InferenceMode");
  inference_key_ = difference(inference(true), inference(false));
  const py::object functionalize = torch_c("DispatchKey").attr("Functionalize");
  const uint64_t other =
      difference(torch_c("_IncludeDispatchKeyGuard")(functionalize), inference(false));
  expect((other & inference_key_) == 0, "inference mode");

  for (const bool enabled : {true, false}) {
    const With inside(torch("set_grad_enabled")(enabled));
    expect(grad_mode() == enabled, "grad mode");
  }
  const With inside(torch("overrides").attr("BaseTorchFunctionMode")());
  expect(function_mode_enabled_(), "function modes");
}

}  // namespace merge_attn_states
