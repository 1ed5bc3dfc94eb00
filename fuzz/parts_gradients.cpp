// The gradients that an accepted backward call must have written.
#include <cmath>

#include "parts_expected.h"
#include "parts_row.h"

namespace merge_attn_states::fuzz {

void check_gradients(const CallOfParts& call) {
  const uint32_t first = call.parts[0].output.view.dtype;
  const Real eps = epsilon(first);
  const int dims = call.row_dims();
  const auto& of_out = call.out.view;
  const int64_t head_size = of_out.sizes[dims];
  const auto check = [&](const Operand& operand, const Index& index, const Estimate& expected,
                         bool is_zero) {
    const Format& format = format_of(operand.view.dtype);
    const Real got = value_at(format, address_of(operand.view, index));
    if ((is_zero && got == 0) || is_close(format, got, expected, false)) return;
    fail("%s[%ld, %ld, %ld, %ld, %ld, %ld]: expected %.20Lg +- %.3Lg, got %.20Lg",
         operand.name.c_str(), index[0], index[1], index[2], index[3], index[4], index[5],
         is_zero ? 0 : expected.value, is_zero ? 0 : expected.error, got);
  };
  for_each_row(call, [&](const Row& row, const Index& index) {
    const size_t num_parts = row.terms.size() - 1;
    std::vector<Real> gradient(head_size), most(head_size), dots(row.terms.size());
    Real mean = 0, bound = 0, of_lse = 0;
    Index at = index;
    for (int64_t i = 0; i < head_size; ++i) {
      at[dims] = i;
      gradient[i] = read(call.regions, call.out, at);
    }
    if (call.out_lse.given) {
      of_lse = read(call.regions, call.out_lse, index) / static_cast<Real>(ln_of(call.out_base()));
    }
    for (size_t k = 0; k < num_parts; ++k) {
      const Term& term = row.terms[k];
      for (int64_t i = 0; i < head_size && !term.skipped; ++i) {
        dots[k] += term.value(i) * gradient[i];
        most[i] = std::max(most[i], std::fabs(term.value(i)));
      }
      if (!term.skipped) mean += term.weight * dots[k];
    }
    for (int64_t i = 0; i < head_size; ++i) bound += most[i] * std::fabs(gradient[i]);
    bound += std::fabs(of_lse);
    for (size_t k = 0; k <= num_parts; ++k) {
      const Term& term = row.terms[k];
      const bool is_sink = k == num_parts;
      Index of_part{static_cast<int64_t>(k)};
      std::copy_n(index.begin(), dims, of_part.begin() + 1);
      for (int64_t i = 0; i < head_size && !is_sink && call.grad_outputs.given; ++i) {
        of_part[dims + 1] = i;
        Estimate expected = row.product(term, gradient[i], row.rounding() * eps);
        if (row.nan) expected = {NAN, 0};
        if (term.skipped) expected = {0, 0};
        check(call.grad_outputs, of_part, expected, term.skipped);
      }
      const Operand& operand = is_sink ? call.grad_sink : call.grad_lses;
      // Where numbers overflow, what is left of them says nothing.
      if (!operand.given || (!term.skipped && !row.nan && !(bound < 1e30L))) continue;
      const Real base =
          static_cast<Real>(ln_of(is_sink ? call.out_base() : call.base_of(static_cast<int>(k))));
      Estimate expected{base * term.weight * (dots[k] - mean + of_lse),
                        16 * eps * bound + 0x1p-120L};
      if (row.nan) expected = {NAN, 0};
      if (term.skipped) expected = {0, 0};
      check(operand, is_sink ? index : of_part, expected, term.skipped);
    }
  });
}

}  // namespace merge_attn_states::fuzz
