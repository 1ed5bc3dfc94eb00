#include "parts_expected.h"

#include <cmath>
#include <map>

#include "parts_row.h"

namespace merge_attn_states::fuzz {
namespace {

void check_value(const CallOfParts& call, const Row& row, Index index, int64_t i) {
  const Operand& operand = call.written_out();
  const Format& out = format_of(operand.view.dtype);
  const bool scaled = call.entry == Entry::kMerge && call.scale.given;
  const int dims = call.row_dims();
  index[dims] = i;
  const uint8_t* address = address_of(operand.view, index);
  const auto refuse = [&](const char* what) {
    fail("out[%ld, %ld, %ld, %ld, %ld]: %s", index[0], index[1], index[2], index[3], index[4],
         what);
  };
  const Real eps = epsilon(call.parts[0].output.view.dtype);
  const Term* only = nullptr;  // of the parts that have values
  int count = 0;
  Estimate expected{row.nan ? Real(NAN) : 0, 0};
  Real most = 0;
  for (const Term& term : row.terms) {
    if (row.nan || term.skipped || term.output == nullptr) continue;
    only = count++ == 0 ? &term : nullptr;
    const Real value = term.value(i);
    const Estimate product = row.product(term, value, 0);
    expected.value += product.value, expected.or_nan |= product.or_nan;
    most = std::max(most, std::fabs(value));
  }
  if (!row.nan && count == 0) {
    if (code_at(out, address) != 0) refuse("no part has values, not 0");
    return;
  }
  // Beside a sink of next to no weight a row may be copied, too.
  if (only != nullptr && only->output->view.dtype == out.dtype && !scaled) {
    Index at = only->row;
    at[dims] = i;
    const uint8_t* from = before(*only->output->region, only->output->view, at);
    const bool is_copied = code_at(out, from) == code_at(out, address);
    if (is_copied && only->weight > 1 - eps) return;
    if (row.alone >= 0) refuse("a copied row lost a bit");
  }
  if (row.alone >= 0 && only != nullptr) {
    expected = {only->value(i), 0};
  } else if (std::isfinite(most)) {
    expected.error = row.rounding() * eps * most;
  }
  if (scaled) {
    const Real scale = read(call.regions, call.scale, {});
    expected = divide(expected, scale, 0x1p-23L);
  }
  const Real got = value_at(out, address);
  if (!is_close(out, got, expected, is_fp8(out.dtype))) {
    std::fprintf(stderr, "expected %.20Lg +- %.3Lg, got %.20Lg\n", expected.value, expected.error,
                 got);
    refuse("another value");
  }
}

void check_lse(const CallOfParts& call, const Row& row, const Index& index) {
  const Operand& operand = call.written_lse();
  const Format& format = format_of(operand.view.dtype);
  const Real got = value_at(format, address_of(operand.view, index));
  Estimate expected{row.nan ? Real(NAN) : -kInf, 0};
  if (!row.nan && row.alone >= 0 && row.one_base) {
    expected.value = row.terms[row.alone].lse;
  } else if (!row.nan && row.count > 0) {
    expected.value = static_cast<Real>(row.lse / ln_of(call.out_base()));
    expected.error = 4 * epsilon(format.dtype) * std::max<Real>(1, std::fabs(expected.value));
  }
  const bool is_exact = expected.error == 0;
  const bool same = got == expected.value || (std::isnan(got) && std::isnan(expected.value));
  if (!same && (is_exact || !is_close(format, got, expected, false))) {
    fail("lse[%ld, %ld, %ld, %ld]: expected %.20Lg +- %.3Lg, got %.20Lg", index[0], index[1],
         index[2], index[3], expected.value, expected.error, got);
  }
}

// Rows of the state that no row of the block is for.
void check_kept(const CallOfParts& call, const std::map<int64_t, int>& times) {
  for (const Operand* operand : call.written()) {
    for_each_element(operand->view, [&](const Index& index, const uint8_t* address) {
      const uint8_t* old = before(call.regions[operand->region], operand->view, index);
      const bool kept = std::memcmp(address, old, bytes_of(operand->view.dtype)) == 0;
      if (times.count(index[0]) == 0 && !kept) fail("row %ld of the state changed", index[0]);
    });
  }
}

}  // namespace

bool check_merged(const CallOfParts& call) {
  bool promised = true;
  const bool scatters = call.is_update() && call.parts[0].index.given;
  std::map<int64_t, int> times;
  if (scatters) {
    const int64_t num_rows = call.parts[0].index.view.sizes[0];
    for (int64_t i = 0; i < num_rows; ++i) ++times[row_at(call, call.parts[0], i)];
    check_kept(call, times);
  }
  const auto& view = call.written_out().view;
  for_each_row(call, [&](const Row& row, const Index& index) {
    Index at = index;
    if (scatters) at[0] = row.terms[0].row[0];
    if (at[0] < 0) return;
    // Of a row that several are merged into, nothing is.
    if (scatters && times[at[0]] > 1) return void(promised = false);
    for (int64_t i = 0; i < view.sizes[view.rank - 1]; ++i) check_value(call, row, at, i);
    if (call.written_lse().given) check_lse(call, row, at);
  });
  return promised;
}

}  // namespace merge_attn_states::fuzz
