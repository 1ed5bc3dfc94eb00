// One row of a merge of many parts: what it is merged of, with which weights.
#pragma once

#include "estimate.h"
#include "parts_call.h"

namespace merge_attn_states::fuzz {

// LSEs as natural ones: a difference of large ones, to two bases, is finer than float64.
using Wide = __float128;
constexpr Wide kLn2 = Wide(0x1.62e42fefa39efp-1) + Wide(0x1.abc9e3b39803fp-56);
constexpr Wide ln_of(int base) { return base == 0 ? Wide(1) : kLn2; }

// A part's row; or the sink, which has no values.
struct Term {
  const View* output = nullptr;  // null: the part has no such row
  Index row{};
  Real lse = -kInf;  // in its own base
  Wide natural = 0;
  Real weight = 0, difference = 0;  // to the largest natural LSE
  bool skipped = true;

  Real value(int64_t i) const;
};

struct Row {
  std::vector<Term> terms;  // the parts, and the sink
  bool nan = false;
  int alone = -1, count = 0;  // the terms that are not skipped, and the only one of them
  Wide lse = 0;               // natural, where there is one
  bool one_base = true;

  Row(const CallOfParts& call, const std::vector<View>& outputs, const std::vector<View>& lses,
      const Index& index);

  // A term's weight times a value.
  Estimate product(const Term& term, Real value, Real error) const;
  // In eps of the largest value. Sums of sixteen are added one by one, and errors of many alike
  // parts have one sign.
  Real rounding() const { return 8 + Real(count) / 64; }

 private:
  Underflow underflow_;
  void take(Term& term, Real number, int base);
  void read_part(const CallOfParts& call, int k, const View& output, const View& lse,
                 const Index& index);
};

Real read(const Regions& regions, const Operand& operand, const Index& index);  // before the call

// Calls f(row, index) for each row of the merge.
template <class F>
void for_each_row(const CallOfParts& call, F&& f) {
  std::vector<View> outputs, lses;
  const bool is_stack = call.is_stack, is_update = call.is_update();
  const int num_parts = is_stack    ? int(call.reference().view.sizes[call.stack_dim()])
                        : is_update ? 2
                                    : call.args.num_parts;
  for (int k = 0; k < num_parts; ++k) {
    outputs.push_back(call.output_of(k)), lses.push_back(call.lse_of(k));
  }
  const Operand& like = is_update ? call.reference() : call.out;
  View rows(call.regions, like, call.row_dims());
  rows.view.data = call.regions[0].bytes.get();  // of no element there may be no memory
  std::fill(rows.strides.begin(), rows.strides.end(), 0);
  for_each_element(rows.view, [&](const Index& index, const uint8_t*) {
    f(Row(call, outputs, lses, index), index);
  });
}

}  // namespace merge_attn_states::fuzz
