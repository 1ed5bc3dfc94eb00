// libFuzzer target of the entries of many parts, without Torch: every call is refused with a
// sentence that names an argument that is really at fault, and nothing is written; or it is legal,
// and gives the reference's numbers with no other byte changed, and the same bits by the baseline
// build of the CPU kernel, however that cuts the rows into tiles.
//
//   parts_call       bytes -> operands and structs
//   parts_layout     where they lie, what is odd, what memory holds
//   parts_legality   the contract once more
//   parts_expected   the numbers once more
//
// and what merge_fuzz.cpp lists. STATISTICS=1 and DESCRIBE=1 as there.
#include <cstdio>
#include <cstdlib>

#include "../csrc/core/parts_call.h"
#include "../csrc/cpu/kernels.h"
#include "answer.h"
#include "estimate.h"
#include "parts_expected.h"
#include "parts_legality.h"

namespace merge_attn_states::fuzz {
namespace {

struct Statistics {
  long calls = 0, refused_overlap = 0, accepted[3] = {}, with_rows[3] = {};
  ~Statistics() {
    if (std::getenv("STATISTICS") == nullptr) return;
    std::fprintf(stderr,
                 "%ld calls, %ld refused for an overlap; accepted (with rows): %ld (%ld) merges, "
                 "%ld (%ld) updates, %ld (%ld) backward calls\n",
                 calls, refused_overlap, accepted[0], with_rows[0], accepted[1], with_rows[1],
                 accepted[2], with_rows[2]);
  }
} statistics;

template <class Struct>
const Struct* get(const CallOfParts& call, const Passed<Struct>& passed) {
  return call.is_null ? nullptr : passed.get();
}

Answer run(const CallOfParts& call, size_t size) {
  return answer(size, [&](char* text, size_t room) {
    switch (call.entry) {
      case Entry::kMerge:
        return merge_attn_states_merge_parts(get(call, call.passed_args), text, room);
      case Entry::kUpdate:
        return merge_attn_states_update(get(call, call.passed_update), text, room);
      default:
        return merge_attn_states_backward(get(call, call.passed_backward), text, room);
    }
  });
}

// The whole sentence, and nothing written.
Answer probe(const CallOfParts& call) {
  constexpr size_t kWhole = 4096;
  if (call.is_backward()) {
    const Answer ran = run(call, kWhole);
    if (ran.status == MERGE_ATTN_STATES_OK) restore(call.regions);
    return ran;
  }
  merge_attn_states_selection selection{.struct_size = sizeof(selection)};
  const Answer selected = answer(kWhole, [&](char* text, size_t room) {
    const auto* args = get(call, call.passed_args);
    const auto* update = get(call, call.passed_update);
    return call.is_update() ? merge_attn_states_select_update(update, &selection, text, room)
                            : merge_attn_states_select_parts(args, &selection, text, room);
  });
  if (selected.status == MERGE_ATTN_STATES_OK && std::string(selection.kernel) != "cpu") {
    fail("kernel %.16s", selection.kernel);
  }
  return selected;
}

// The same call by the baseline build and in other tiles, from the same memory, against what the
// chosen build made.
void check_baseline(const CallOfParts& call) {
  const auto chosen = copy_of(call.regions);
  restore(call.regions);
  const PartsCall valid = call.is_backward() ? validate(call.passed_backward.get())
                          : call.is_update() ? validate(call.passed_update.get())
                                             : validate(call.passed_args.get());
  if (valid.nothing_to_do()) return;
  cpu::PartsTiles tiles{.dims = {call.cut % 4, (call.cut + 1 + call.cut / 4 % 3) % 4},
                        .streams = false};
  int64_t count = 1;
  for (int dim = 0; dim < kMaxRowDims; ++dim) {
    tiles.extents[dim] = dim == tiles.dims.along ? 1 + call.cut % cpu::kTileTokens : 1;
    tiles.counts[dim] = cpu::tiles(valid.sizes[dim], tiles.extents[dim]);
    count *= tiles.counts[dim];
  }
  (call.is_backward() ? cpu::baseline::backward_parts : cpu::baseline::merge_parts)(valid, tiles, 0,
                                                                                    count);
  check_untouched(call.regions, call.written());
  check_same(call.regions, call.written(), chosen);
}

void check_accepted(const CallOfParts& call) {
  const int entry = static_cast<int>(call.entry);
  ++statistics.accepted[entry];
  check_untouched(call.regions, call.written());
  const View rows(call.regions, call.reference(), call.row_dims() + call.is_stack);
  if (is_empty(rows.view)) return;
  ++statistics.with_rows[entry];
  if (call.is_backward()) {
    check_gradients(call);
  } else if (!check_merged(call)) {
    return;
  }
  check_baseline(call);
}

void check(const CallOfParts& call) {
  const Names faulty = faulty_arguments(call);
  if (std::getenv("DESCRIBE") != nullptr) {
    for (const Operand* operand : call.operands()) {
      if (operand->given) describe(call.regions, *operand);
    }
    std::fprintf(stderr, "entry %d, %d parts, stack %d at %d\n", static_cast<int>(call.entry),
                 call.args.num_parts, call.is_stack, call.args.stack_dim);
  }
  if (faulty.empty() && takes_too_long(call)) return;
  const Answer probed = probe(call);
  check_untouched(call.regions, {});
  const Answer ran = run(call, call.message_size);
  ++statistics.calls;
  if (probed.status == MERGE_ATTN_STATES_INVALID_ARGUMENT) {
    check_sentence(faulty, probed, ran, call.message_size);
    statistics.refused_overlap += probed.message.find("overlap") != std::string::npos;
    return check_untouched(call.regions, {});
  }
  if (!faulty.empty()) fail("accepted, though %s is at fault", faulty.begin()->c_str());
  const bool on_cuda = call.reference().view.device_type == MERGE_ATTN_STATES_CUDA;
  const bool is_trivial = on_cuda && ran.status == MERGE_ATTN_STATES_OK;
  const auto wanted = on_cuda ? MERGE_ATTN_STATES_UNAVAILABLE : MERGE_ATTN_STATES_OK;
  if ((probed.status != wanted || ran.status != wanted) && !is_trivial) {
    fail("a legal call gives %d and %d: %s", probed.status, ran.status, probed.message.c_str());
  }
  on_cuda ? check_untouched(call.regions, {}) : check_accepted(call);
}

}  // namespace
}  // namespace merge_attn_states::fuzz

extern "C" int LLVMFuzzerTestOneInput(const uint8_t* data, size_t size) {
  merge_attn_states::fuzz::check(merge_attn_states::fuzz::CallOfParts(data, size));
  return 0;
}
