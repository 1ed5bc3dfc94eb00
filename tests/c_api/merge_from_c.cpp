// An engine without Python: opens libmerge_attn_states.so, merges on the CPU, reads a refusal.
//
//     merge_from_c path/to/libmerge_attn_states.so        (torch/lib on LD_LIBRARY_PATH)
//
// test_c_api.py compiles it against the header and against an older and a newer one: SHORTENED has
// no optional fields, LENGTHENED one field more in each struct.
// Prints a line for each thing seen and ends with status 0, or says what was wrong and ends with 1.
#include <dlfcn.h>

#include <cmath>
#include <cstddef>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <new>
#include <vector>

#include "merge_attn_states.h"

// The library's too: the program exports them.
static bool out_of_memory = false;
void* operator new(size_t size) {
  void* memory = out_of_memory ? nullptr : std::malloc(size);
  if (memory == nullptr) throw std::bad_alloc();
  return memory;
}
void operator delete(void* memory) noexcept { std::free(memory); }
void operator delete(void* memory, size_t) noexcept { std::free(memory); }

namespace {

template <class Function>
Function* find(void* library, const char* name) {
  void* symbol = dlsym(library, name);
  if (symbol == nullptr) std::printf("%s\n", dlerror()), std::exit(1);
  return reinterpret_cast<Function*>(symbol);
}

void expect(bool holds, const char* what) {
  std::printf("%s: %s\n", holds ? "ok" : "WRONG", what);
  if (!holds) std::exit(1);
}

// float32 on the CPU, dense, with the memory that it owns.
struct Tensor {
  std::vector<int64_t> sizes, strides;
  std::vector<float> values;
  merge_attn_states_tensor view{};

  explicit Tensor(std::vector<int64_t> shape) : sizes(std::move(shape)), strides(sizes.size()) {
    int64_t count = 1;
    for (size_t i = sizes.size(); i-- > 0; count *= sizes[i]) strides[i] = count;
    values.assign(static_cast<size_t>(count), std::nanf(""));
    view.struct_size = sizeof(view);
    view.data = values.data();
    view.sizes = sizes.data();
    view.strides = strides.data();
    view.rank = static_cast<int32_t>(sizes.size());
    view.dtype = MERGE_ATTN_STATES_FLOAT32;
    view.device_type = MERGE_ATTN_STATES_CPU;
#ifndef SHORTENED
    view.memory = values.data();
    view.memory_bytes = static_cast<int64_t>(values.size() * sizeof(float));
#endif
  }
  Tensor(const Tensor&) = delete;  // view points into this
};

bool is_close(float a, double b) { return std::fabs(a - b) <= 1e-6 * std::fmax(1, std::fabs(b)); }

constexpr int64_t kTokens = 3, kHeads = 2, kHeadSize = 5;

// Three tokens: both parts, an empty prefix, and one past the count; without a count an empty one.
struct Problem {
  Tensor output{{kTokens, kHeads, kHeadSize}}, prefix_output{{kTokens, kHeads, kHeadSize}},
      suffix_output{{kTokens, kHeads, kHeadSize}};
  Tensor prefix_lse{{kHeads, kTokens}}, suffix_lse{{kHeads, kTokens}},
      output_lse{{kHeads, kTokens}};
  merge_attn_states_args args{};

  Problem() {
    for (size_t i = 0; i < prefix_output.values.size(); ++i) {
      prefix_output.values[i] = static_cast<float>(i);
      suffix_output.values[i] = -2.0f * static_cast<float>(i) - 1.0f;
    }
    for (size_t head = 0; head < kHeads; ++head) {
#ifdef SHORTENED
      const float lse[kTokens] = {0.5f, -INFINITY, INFINITY};
#else
      const float lse[kTokens] = {0.5f, -INFINITY, NAN};
#endif
      std::memcpy(&prefix_lse.values[head * kTokens], lse, sizeof(lse));
      for (size_t token = 0; token < kTokens; ++token) {
        suffix_lse.values[head * kTokens + token] = 1.5f * static_cast<float>(head);
      }
    }
    args.struct_size = sizeof(args);
#ifndef SHORTENED
    args.has_prefill_tokens_with_context = 1;
    args.prefill_tokens_with_context = 2;
#endif
    args.output = &output.view;
    args.prefix_output = &prefix_output.view;
    args.prefix_lse = &prefix_lse.view;
    args.suffix_output = &suffix_output.view;
    args.suffix_lse = &suffix_lse.view;
    args.output_lse = &output_lse.view;
  }

  bool is_merged() const {
    bool right = true;
    for (int64_t token = 0; token < kTokens; ++token) {
      for (int64_t head = 0; head < kHeads; ++head) {
        const double suffix = suffix_lse.values[head * kTokens + token];
        const double both = std::log(std::exp(0.5) + std::exp(suffix));
        const double weight = token == 0 ? std::exp(0.5 - both) : 0;
        const double lse = token == 0 ? both : suffix;
        right = right && is_close(output_lse.values[head * kTokens + token], lse);
        for (int64_t i = 0; i < kHeadSize; ++i) {
          const size_t at = (token * kHeads + head) * kHeadSize + i;
          const double merged =
              weight * prefix_output.values[at] + (1 - weight) * suffix_output.values[at];
          right = right && is_close(output.values[at], merged);
        }
      }
    }
    return right;
  }
};

bool is_untouched(const Tensor& tensor) {
  for (float value : tensor.values) {
    if (value == value) return false;
  }
  return true;
}

}  // namespace

int main(int count, char** arguments) {
  if (count != 2) return std::printf("usage: %s libmerge_attn_states.so\n", arguments[0]), 1;
  void* library = dlopen(arguments[1], RTLD_NOW | RTLD_LOCAL);
  if (library == nullptr) return std::printf("%s\n", dlerror()), 1;
  const auto merge = find<decltype(merge_attn_states_merge)>(library, "merge_attn_states_merge");
  const auto select = find<decltype(merge_attn_states_select)>(library, "merge_attn_states_select");
  const auto build_info =
      find<decltype(merge_attn_states_build_info)>(library, "merge_attn_states_build_info");

  expect(std::strstr(build_info(), "\"version\": \"") != nullptr, "build_info tells the version");
  expect(dlsym(RTLD_DEFAULT, "Py_Initialize") == nullptr, "there is no Python in this process");

  char message[200] = "";
  Problem problem;
  merge_attn_states_selection selection;
  std::memset(&selection, 'x', sizeof(selection));  // only the size is set
  selection.struct_size = sizeof(selection);
  expect(select(&problem.args, &selection, message, sizeof(message)) == MERGE_ATTN_STATES_OK &&
             selection.struct_size == sizeof(selection) &&
             std::strcmp(selection.kernel, "cpu") == 0 && is_untouched(problem.output),
         "select names the kernel and writes nothing");
  expect(merge(&problem.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK,
         "merge accepts the call");
  expect(message[0] == '\0' && problem.is_merged(), "the merged numbers are right");

  Problem refused;
  Tensor transposed({kTokens, kHeads});
  refused.args.prefix_lse = &transposed.view;
  expect(merge(&refused.args, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT,
         "merge refuses an LSE of the wrong shape");
  expect(std::strcmp(message,
                     "prefix_lse: expected shape [2, 3] = [num_heads, num_tokens], "
                     "got [3, 2]") == 0,
         message);
  expect(is_untouched(refused.output) && is_untouched(refused.output_lse),
         "a refusal writes nothing");
  expect(merge(&refused.args, message, 11) == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             std::strcmp(message, "prefix_lse") == 0,
         "a message is cut to its buffer");
  expect(merge(&refused.args, nullptr, 0) == MERGE_ATTN_STATES_INVALID_ARGUMENT,
         "a message may be left out");
  out_of_memory = true;  // for the sentence
  const auto status = merge(&refused.args, message, sizeof(message));
  out_of_memory = false;
  expect(status == MERGE_ATTN_STATES_INTERNAL_ERROR && std::strstr(message, "bad_alloc") &&
             is_untouched(refused.output),
         "no memory is not the call's fault");
  expect(merge(nullptr, message, sizeof(message)) == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             std::strncmp(message, "args: ", 6) == 0,
         "null arguments are refused");
  expect(select(&problem.args, nullptr, message, sizeof(message)) ==
                 MERGE_ATTN_STATES_INVALID_ARGUMENT &&
             std::strncmp(message, "selection: ", 11) == 0,
         "a null selection is refused");

  const auto refuses = [&](const char* name, const char* what) {
    Problem sized;
    problem.args.output = &sized.output.view;  // its NaNs show a write
    message[0] = '\0';
    const auto status = merge(&problem.args, message, sizeof(message));
    expect(status == MERGE_ATTN_STATES_INVALID_ARGUMENT &&
               std::strncmp(message, name, std::strlen(name)) == 0 && is_untouched(sized.output),
           what);
    std::printf("ok: %s\n", message);
  };
  for (const size_t size : {size_t{0}, offsetof(merge_attn_states_args, stream), ~size_t{0}}) {
    problem.args.struct_size = size;
    refuses("args: ", "arguments of no possible size are refused");
  }
  problem.args.struct_size = sizeof(problem.args);
  for (const size_t size : {size_t{0}, offsetof(merge_attn_states_tensor, device_index)}) {
    problem.suffix_lse.view.struct_size = size;
    refuses("suffix_lse: ", "a tensor of no possible size is refused");
  }
  problem.suffix_lse.view.struct_size = sizeof(problem.suffix_lse.view);
#ifdef LENGTHENED
  problem.args.later = 1;
  refuses("args: ", "arguments that ask for what the library does not know are refused");
  problem.args.later = 0;
  problem.suffix_lse.view.later = 1;
  refuses("suffix_lse: ", "a tensor that asks for what the library does not know is refused");
  problem.suffix_lse.view.later = 0;
  expect(selection.later == 0, "what the library does not fill is 0");
#endif
  problem.args.output = &problem.output.view;
  expect(
      merge(&problem.args, message, sizeof(message)) == MERGE_ATTN_STATES_OK && problem.is_merged(),
      "what was refused for its sizes is merged with the right ones");
  return 0;
}
