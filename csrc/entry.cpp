// The C entry: every call, from Python, from torch.ops or from C, passes here in three steps.
#include <merge_attn_states_commit.h>

#include <algorithm>
#include <cstddef>
#include <cstdio>
#include <cstring>
#include <string>

#include "core/struct_size.h"
#include "devices.h"
#include "ranks_entry.h"

namespace merge_attn_states {
namespace {

// Runs one entry and turns whatever it throws into a status and a message: nothing may pass the C
// border.
template <class F>
merge_attn_states_status guarded(char* message, size_t message_size, F&& entry) noexcept {
  const auto fail = [&](merge_attn_states_status status, const char* text) {
    if (message != nullptr && message_size > 0) std::snprintf(message, message_size, "%s", text);
    return status;
  };
  try {
    entry();
    return MERGE_ATTN_STATES_OK;
  } catch (const std::invalid_argument& error) {
    return fail(MERGE_ATTN_STATES_INVALID_ARGUMENT, error.what());
  } catch (const CudaError& error) {
    return fail(MERGE_ATTN_STATES_CUDA_ERROR, error.what());
  } catch (const Unavailable& error) {
    return fail(MERGE_ATTN_STATES_UNAVAILABLE, error.what());
  } catch (const std::exception& error) {
    return fail(MERGE_ATTN_STATES_INTERNAL_ERROR, error.what());
  } catch (...) {
    return fail(MERGE_ATTN_STATES_INTERNAL_ERROR, "merge_attn_states: unknown error");
  }
}

#ifdef __clang__
constexpr const char* kCompiler = __VERSION__;
#else
constexpr const char* kCompiler = "GCC " __VERSION__;
#endif

// Tokens past the context count become the suffix. Where the output is the suffix they need no
// work, and the call ends at the count.
MergeCall validated(const merge_attn_states_args* args) {
  MergeCall call = validate(args);
  if (call.has_rows_to_keep() && call.keeps_suffix_lses()) {
    call.geometry.num_tokens = call.rule.num_tokens_with_context;
  }
  return call;
}

template <class Args>
PartsCall validated(const Args* args) {
  return validate(args);
}

template <class Call>
Selection choose(const Call& call) {
  return call.device_type == MERGE_ATTN_STATES_CPU ? cpu::choose() : cuda::choose(call);
}

template <class Call>
void run(const Call& call) {
  return call.device_type == MERGE_ATTN_STATES_CPU ? cpu::run(call) : cuda::run(call);
}

// A caller's struct ends where its header ended, behind the variant or later; what it holds beyond
// this library's is 0.
void fill(merge_attn_states_selection* to, Selection chosen) {
  constexpr size_t kSmallest = offsetof(Selection, variant) + sizeof(Selection::variant);
  chosen.struct_size = checked_struct_size(to, "selection", kSmallest);
  std::memset(static_cast<void*>(to), 0, chosen.struct_size);
  std::memcpy(static_cast<void*>(to), &chosen, std::min(chosen.struct_size, sizeof(chosen)));
}

template <class Args>
merge_attn_states_status merge(const Args* args, char* message, size_t message_size) noexcept {
  return guarded(message, message_size, [&] {
    const auto call = validated(args);
    if (!call.nothing_to_do()) run(call);
  });
}

template <class Args>
merge_attn_states_status select(const Args* args, merge_attn_states_selection* selection,
                                char* message, size_t message_size) noexcept {
  return guarded(message, message_size, [&] { fill(selection, choose(validated(args))); });
}

}  // namespace

#ifndef MERGE_ATTN_STATES_WITH_CUDA
namespace cuda {
[[noreturn]] static void refuse() {
  throw Unavailable(
      "this build of merge_attn_states has no CUDA kernels; reinstall it on a machine with the "
      "CUDA toolkit (MERGE_ATTN_STATES_CUDA=1 insists on them)");
}
Selection choose(const MergeCall&) { refuse(); }
void run(const MergeCall&) { refuse(); }
Selection choose(const PartsCall&) { refuse(); }
void run(const PartsCall&) { refuse(); }
void run_backward(const PartsCall&) { refuse(); }
PeerLayout peer_layout(int64_t, int64_t, int64_t) { refuse(); }
void run(const RanksCall&) { refuse(); }
}  // namespace cuda
#endif

}  // namespace merge_attn_states

merge_attn_states_status merge_attn_states_merge(const merge_attn_states_args* args, char* message,
                                                 size_t message_size) noexcept {
  return merge_attn_states::merge(args, message, message_size);
}

merge_attn_states_status merge_attn_states_select(const merge_attn_states_args* args,
                                                  merge_attn_states_selection* selection,
                                                  char* message, size_t message_size) noexcept {
  return merge_attn_states::select(args, selection, message, message_size);
}

merge_attn_states_status merge_attn_states_merge_parts(const merge_attn_states_parts_args* args,
                                                       char* message,
                                                       size_t message_size) noexcept {
  return merge_attn_states::merge(args, message, message_size);
}

merge_attn_states_status merge_attn_states_select_parts(const merge_attn_states_parts_args* args,
                                                        merge_attn_states_selection* selection,
                                                        char* message,
                                                        size_t message_size) noexcept {
  return merge_attn_states::select(args, selection, message, message_size);
}

merge_attn_states_status merge_attn_states_update(const merge_attn_states_update_args* args,
                                                  char* message, size_t message_size) noexcept {
  return merge_attn_states::merge(args, message, message_size);
}

merge_attn_states_status merge_attn_states_select_update(const merge_attn_states_update_args* args,
                                                         merge_attn_states_selection* selection,
                                                         char* message,
                                                         size_t message_size) noexcept {
  return merge_attn_states::select(args, selection, message, message_size);
}

merge_attn_states_status merge_attn_states_backward(const merge_attn_states_backward_args* args,
                                                    char* message, size_t message_size) noexcept {
  using namespace merge_attn_states;
  return guarded(message, message_size, [&] {
    const PartsCall call = validate(args);
    // Expanded inputs have any number of rows: what is asked for says that they can be counted.
    const Gradients& asked = call.gradients;
    const bool asks_for_values = asked.outputs != nullptr && call.head_size > 0;
    if (!asks_for_values && asked.lses == nullptr && asked.sink == nullptr) return;
    if (call.nothing_to_do()) return;
    call.device_type == MERGE_ATTN_STATES_CPU ? cpu::run_backward(call) : cuda::run_backward(call);
  });
}

merge_attn_states_status merge_attn_states_merge_ranks(
    const merge_attn_states::RanksArguments* args, char* message, size_t message_size) noexcept {
  using namespace merge_attn_states;
  return guarded(message, message_size, [&] {
    if (args->output->sizes[0] > 0) cuda::run(ranks_call(*args));
  });
}

const char* merge_attn_states_build_info() noexcept {
  // Made once: the instruction set is known only on the machine at hand.
  static const std::string info = [] {
    using namespace merge_attn_states;
    Selection cpu_kernel = selection("cpu", "none: MERGE_ATTN_STATES_CPU_KERNEL asks for another");
    guarded(nullptr, 0, [&] { cpu_kernel = cpu::choose(); });
    const auto text = [](const char* value) { return '"' + std::string(value) + '"'; };
    std::string json = "{\"version\": " + text(MERGE_ATTN_STATES_BUILD_VERSION) +
                       ", \"commit\": " + text(MERGE_ATTN_STATES_BUILD_COMMIT) +
                       ", \"torch\": " + text(MERGE_ATTN_STATES_BUILD_TORCH) +
                       ", \"compiler\": " + text(kCompiler);
#ifdef MERGE_ATTN_STATES_WITH_CUDA
    json += ", \"cuda\": " + text(MERGE_ATTN_STATES_BUILD_CUDA);
#else
    json += ", \"cuda\": null";
#endif
    return json + ", \"architectures\": " + text(MERGE_ATTN_STATES_BUILD_ARCHITECTURES) +
           ", \"cpu\": " + text(cpu_kernel.variant) + "}";
  }();
  return info.c_str();
}
