// libFuzzer target of the C entry, without Torch: every call is refused with a sentence that names
// an argument that is really at fault, and nothing is written; or it is legal, and merged to the
// reference's numbers with no other byte changed, to the same bits by both builds of the CPU
// kernel.
//
//   call       bytes -> operands and the memory that holds them
//   legality   the contract once more: may this call be refused, and for which argument?
//   expected   the numbers once more, in long double
//
// and of every call's, shared with parts_fuzz:
//
//   operand    a tensor as it is passed, and the memory that really holds it
//   place      strides, where in memory, and what the library is told of it
//   faults     what makes a call odd
//   touch      the contract of one operand, and which bytes it has
//   values     formats, and what the memory is filled with
//   estimate   numbers with the error that they may have
//   answer     status and sentence
//
// STATISTICS=1 prints at the end how many calls were merged and how many refused, DESCRIBE=1 each
// call.
#include <algorithm>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

#include "../csrc/core/merge_call.h"
#include "../csrc/cpu/kernels.h"
#include "answer.h"
#include "call.h"
#include "estimate.h"
#include "expected.h"
#include "legality.h"

namespace merge_attn_states::fuzz {
namespace {

#ifdef __x86_64__
static_assert(MERGE_ATTN_STATES_HAS_V3, "the build must switch the wider CPU kernel on");
#endif

struct Statistics {
  long calls = 0, merged = 0, merged_rows = 0, refused_overlap = 0;
  ~Statistics() {
    if (std::getenv("STATISTICS") == nullptr) return;
    std::fprintf(stderr,
                 "%ld calls, %ld merged, %ld of them with rows, %ld refused for an overlap\n",
                 calls, merged, merged_rows, refused_overlap);
  }
} statistics;

// Shows a finding.
void describe(const Call& call) {
  for (const Operand& operand : call.operands) describe(call.regions, operand);
  std::fprintf(stderr, "count %ld (given: %d)\n", call.args.prefill_tokens_with_context,
               call.args.has_prefill_tokens_with_context);
}

Answer select(const Call& call) {
  merge_attn_states_selection selection{.struct_size = sizeof(selection)};
  return answer(4096, [&](char* message, size_t size) {
    return merge_attn_states_select(call.passed.get(), &selection, message, size);
  });
}

// Only its size is set, and its memory ends where that says.
void check_selection(const Call& call) {
  const size_t size = call.selection_size, ours = sizeof(merge_attn_states_selection);
  const std::unique_ptr<uint8_t[]> bytes(new uint8_t[std::clamp(size, ours, kLargestStruct)]);
  std::fill_n(bytes.get(), std::clamp(size, ours, kLargestStruct), 'x');
  auto* selection = reinterpret_cast<merge_attn_states_selection*>(bytes.get());
  selection->struct_size = size;
  std::string message(4096, '\0');
  const auto status =
      merge_attn_states_select(call.passed.get(), selection, message.data(), message.size());
  if (size < ours || size > kLargestStruct) {
    if (message.find("selection: ") != 0) fail("a selection of %zu bytes: status %d", size, status);
    return;
  }
  const bool rest_is_0 = std::all_of(&bytes[ours], &bytes[size], [](uint8_t at) { return !at; });
  if (status != MERGE_ATTN_STATES_OK || selection->struct_size != size || !rest_is_0 ||
      std::string(selection->kernel) != "cpu" || std::strlen(selection->variant) == 0) {
    fail("a selection of %zu bytes: status %d, kernel %.16s", size, status, selection->kernel);
  }
}

Answer merge(const Call& call) {
  return answer(call.message_size, [&](char* message, size_t size) {
    return merge_attn_states_merge(call.passed.get(), message, size);
  });
}

void check_refusal(const Call& call, const Names& faulty, const Answer& selected,
                   const Answer& merged) {
  check_sentence(faulty, selected, merged, call.message_size);
  check_untouched(call.regions, {});
  if (selected.message.find("overlap") != std::string::npos) ++statistics.refused_overlap;
}

// Legal, but for a device that this build does not know: no number is looked at.
void check_unavailable(const Call& call, const Answer& selected, const Answer& merged) {
  if (selected.status != MERGE_ATTN_STATES_UNAVAILABLE || selected.message.empty()) {
    fail("a CUDA call gives status %d", selected.status);
  }
  const bool trivial = merged.status == MERGE_ATTN_STATES_OK;
  if (!trivial && merged.status != MERGE_ATTN_STATES_UNAVAILABLE) {
    fail("a CUDA call gives status %d", merged.status);
  }
  check_untouched(call.regions, {});
}

std::vector<const Operand*> written(const Call& call) {
  return {&call.operands[kOutput], &call.operands[kOutputLse]};
}

bool has_rows(const Call& call) {
  const int64_t* sizes = call.view(kOutput).sizes;
  return sizes[0] > 0 && sizes[1] > 0 && (sizes[2] > 0 || call.operands[kOutputLse].given);
}

void check_result(const Call& call) {
  check_untouched(call.regions, written(call));
  if (!has_rows(call)) return;
  check_output(call);
  check_output_lse(call);
}

// The same call by the baseline build, from the same memory, against what the chosen build made.
void check_baseline(const Call& call) {
  const auto chosen = copy_of(call.regions);
  restore(call.regions);
  const MergeCall valid = validate(call.passed.get());
  const auto& [num_tokens, num_heads, head_size] = valid.geometry;
  cpu::baseline::merge_tiles(
      valid, false, 0,
      cpu::tiles(num_tokens, cpu::kTileTokens) * cpu::tiles(num_heads, cpu::tile_heads(valid)));
  check_untouched(call.regions, written(call));
  check_same(call.regions, written(call), chosen);
}

void check(const Call& call) {
  const Names faulty = faulty_arguments(call);
  if (std::getenv("DESCRIBE") != nullptr) describe(call);
  const Answer selected = select(call);
  check_untouched(call.regions, {});
  const Answer merged = merge(call);
  ++statistics.calls;
  if (selected.status == MERGE_ATTN_STATES_INVALID_ARGUMENT) {
    return check_refusal(call, faulty, selected, merged);
  }
  if (!faulty.empty()) fail("accepted, though %s is at fault", faulty.begin()->c_str());
  if (call.view(kOutput).device_type == MERGE_ATTN_STATES_CUDA) {
    return check_unavailable(call, selected, merged);
  }
  if (selected.status != MERGE_ATTN_STATES_OK || merged.status != MERGE_ATTN_STATES_OK) {
    fail("a legal call gives %d and %d: %s", selected.status, merged.status,
         selected.message.c_str());
  }
  check_selection(call);
  ++statistics.merged;
  check_result(call);
  if (!has_rows(call)) return;
  ++statistics.merged_rows;
  check_baseline(call);
}

}  // namespace
}  // namespace merge_attn_states::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  merge_attn_states::fuzz::check(merge_attn_states::fuzz::Call(data, size));
  return 0;
}
