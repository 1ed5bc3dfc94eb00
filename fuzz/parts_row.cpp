#include "parts_row.h"

#include <cmath>

namespace merge_attn_states::fuzz {

Real Term::value(int64_t i) const {
  Index at = row;
  at[output->view.rank - 1] = i;
  return value_at(format_of(output->view.dtype), before(*output->region, output->view, at));
}

Row::Row(const CallOfParts& call, const std::vector<View>& outputs, const std::vector<View>& lses,
         const Index& index)
    : terms(outputs.size() + 1), underflow_(call.parts[0].output.view.dtype) {
  for (size_t k = 0; k < outputs.size(); ++k) {
    read_part(call, static_cast<int>(k), outputs[k], lses[k], index);
  }
  if (call.sink.given && !call.is_update()) {
    const int64_t head = index[call.row_dims() - 1];
    take(terms.back(), read(call.regions, call.sink, {head}), call.out_base());
  }
  Wide largest = 0;
  for (const Term& term : terms) {
    if (term.skipped) continue;
    largest = count++ == 0 ? term.natural : std::max(largest, term.natural);
    alone = static_cast<int>(&term - terms.data());
  }
  if (count != 1) alone = -1;
  Real sum = 0;
  for (Term& term : terms) {
    if (term.skipped) continue;
    term.difference = static_cast<Real>(largest - term.natural);
    sum += term.weight = underflow_.exp(term.difference);
  }
  for (Term& term : terms) term.weight /= count == 0 ? 1 : sum;
  lse = largest + Wide(std::log(sum));
}

Estimate Row::product(const Term& term, Real value, Real error) const {
  const bool undecided = std::isinf(value) && underflow_.is_undecided(term.difference);
  return {term.weight * value, std::isfinite(value) ? error * std::fabs(value) : 0, undecided};
}

void Row::take(Term& term, Real number, int base) {
  term.lse = number;
  nan |= std::isnan(number);
  term.skipped = std::isinf(number);
  term.natural = std::isfinite(number) ? Wide(number) * ln_of(base) : Wide(0);
}

void Row::read_part(const CallOfParts& call, int k, const View& output, const View& lse,
                    const Index& index) {
  const FuzzedPart& part = call.part(k);
  Term& term = terms[k];
  one_base &= call.base_of(k) == call.out_base();
  term.row = index;
  if (k == 0 || !call.is_update()) term.row[0] = row_at(call, part, index[0]);
  if (term.row[0] < 0) return;
  term.output = &output;
  if (part.empty.given) {
    const bool marked = *before(call.regions[part.empty.region], part.empty.view, term.row) != 0;
    if (marked != call.inverts_empty()) return;
  }
  const Format& format = format_of(lse.view.dtype);
  take(term, value_at(format, before(*lse.region, lse.view, term.row)), call.base_of(k));
}

Real read(const Regions& regions, const Operand& operand, const Index& index) {
  return value_at(format_of(operand.view.dtype),
                  before(regions[operand.region], operand.view, index));
}

}  // namespace merge_attn_states::fuzz
