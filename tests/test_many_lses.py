"""What each of many parts weighs, and their LSE: core/state.h by itself against float64."""

import ctypes
import itertools
import math
from decimal import Decimal

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import F32, F64, assert_bits, assert_within, compiled

from merge_attn_states.reference import merge_states_reference

E, TWO = 0, 1
NAMES = {E: "e", TWO: "2"}
EPS = {F32: 2.0**-23, F64: 2.0**-52}

SOURCE = """
#include <algorithm>
#include <cmath>
#include <cstring>
#include <vector>

#include "cpu/kernels.h"

namespace merge_attn_states::cpu::test {
#include "cpu/pack.h"
#include "cpu/vector_math.h"
}

using namespace merge_attn_states;
using cpu::test::Vector;
using cpu::test::VectorMath;

template <class V, class Acc>
V all(Acc value) {
  return -V{} + value;  // -0 changes no sum
}

template <class Acc, class V>
Acc first(V v) {
  Acc result;
  memcpy(&result, &v, sizeof(result));
  return result;
}

template <class Math, class V, class Lse, bool kMayBeEmpty, class Acc, class Part>
void weigh_as(Base base, int count, Part part, const Lse* sink, Acc* weights, Acc* lse) {
  std::vector<V> terms(count + 1);
  const auto weighed = weigh_parts<Math, V, Lse, kMayBeEmpty>(
      {base, base, false}, count, part, sink, [&](int k) -> V& { return terms[k]; });
  for (int k = 0; k < count; ++k) weights[k] = first<Acc>(terms[k]);
  *lse = first<Acc>(weighed.lse());
}

// As a kernel does, of one row or of eight: `bases` of each part where they differ, else null; the
// sink last. Where no part is empty the weights are those of who knows it, bit for bit; else -2.
template <class Math, class V, class Acc>
void weigh(const Acc* lses, const int* bases, int count, const Acc* sink, Base base, Acc* weights,
           Acc* lse) {
  if (bases != nullptr) {
    const auto part = [&](int k) -> PartLse<V> {
      PartLse<Acc> one{lses[k], Acc(0)};
      if (bases[k] == int(Base::kTwo)) one = natural(lses[k]);
      return {all<V>(one.high), all<V>(one.low)};
    };
    const PartLse<V> logit{all<V>(sink ? *sink : Acc(0)), V{}};
    return weigh_as<Math, V, PartLse<V>, true>(base, count, part, sink ? &logit : nullptr, weights,
                                               lse);
  }
  const auto part = [&](int k) { return all<V>(lses[k]); };
  const V logit = all<V>(sink ? *sink : Acc(0));
  const V* const given = sink ? &logit : nullptr;
  weigh_as<Math, V, V, true>(base, count, part, given, weights, lse);
  const auto is_infinite = [](Acc one) { return std::isinf(one); };
  if (std::any_of(lses, lses + count, is_infinite) || (sink && is_infinite(*sink))) return;
  std::vector<Acc> others(count + 1), own(weights, weights + count);
  own.push_back(*lse);
  weigh_as<Math, V, V, false>(base, count, part, given, others.data(), &others[count]);
  if (memcmp(own.data(), others.data(), sizeof(Acc) * own.size()) != 0) weights[0] = Acc(-2);
}

template <class Math, class V, class Acc>
void pair(const Acc* lses, Acc* weights) {
  const auto merged = merge_lse<Math>(all<V>(lses[0]), all<V>(lses[1]));
  weights[0] = first<Acc>(merged.weights.prefix);
  weights[1] = first<Acc>(merged.weights.suffix);
}

template <class Acc>
Acc sum(const Acc* weights, const Acc* values, int count) {
  SumOfParts<Acc> result;
  for (int k = 0; k < count; ++k) {
    if (k % result.kAtOnce == 0) result.end_sixteen();
    result.add(weights[k], values[k]);
  }
  return result.value();
}

#define FUNCTIONS(Acc, name)                                                                    \\
  extern "C" void weigh_##name(const Acc* lses, const int* bases, int count, const Acc* sink,   \\
                               int base, Acc* weights, Acc* lse) {                              \\
    weigh<ScalarMath<Acc>, Acc>(lses, bases, count, sink, Base(base), weights, lse);            \\
  }                                                                                             \\
  extern "C" void weigh_eight_##name(const Acc* lses, const int* bases, int count,              \\
                                     const Acc* sink, int base, Acc* weights, Acc* lse) {       \\
    weigh<VectorMath<Acc>, Vector<Acc>>(lses, bases, count, sink, Base(base), weights, lse);    \\
  }                                                                                             \\
  extern "C" void pair_weigh_##name(const Acc* lses, Acc* weights) {                            \\
    pair<ScalarMath<Acc>, Acc>(lses, weights);                                                  \\
  }                                                                                             \\
  extern "C" void pair_weigh_eight_##name(const Acc* lses, Acc* weights) {                      \\
    pair<VectorMath<Acc>, Vector<Acc>>(lses, weights);                                          \\
  }                                                                                             \\
  extern "C" void sum_##name(const Acc* weights, const Acc* values, int count, Acc* result) {   \\
    *result = sum(weights, values, count);                                                      \\
  }
FUNCTIONS(float, float32)
FUNCTIONS(double, float64)
"""


@pytest.fixture(scope="module")
def state(tmp_path_factory):
    return compiled(tmp_path_factory.mktemp("state"), SOURCE)


def pointer(tensor):
    return None if tensor is None else ctypes.c_void_p(tensor.data_ptr())


def name_of(dtype):
    return str(dtype).removeprefix("torch.")


WAYS = ["weigh", "weigh_eight"]  # a GPU's thread, and eight rows of a CPU at once


def weigh(way, state, lses, bases=None, sink=None, base=E):
    """Weights and LSE, in `base`; `bases` of each part where these are mixed, then natural."""
    weights, lse = torch.empty_like(lses), torch.empty(1, dtype=lses.dtype)
    of_parts = None if bases is None else torch.tensor(bases, dtype=torch.int32)
    of_sink = None if sink is None else torch.tensor([sink], dtype=lses.dtype)
    getattr(state, f"{way}_{name_of(lses.dtype)}")(
        *(pointer(lses), pointer(of_parts), len(lses), pointer(of_sink), base),
        *(pointer(weights), pointer(lse)),
    )
    return weights, lse


def add_up(state, weights, values):
    result = torch.empty(1, dtype=values.dtype)
    function = getattr(state, f"sum_{name_of(values.dtype)}")
    function(pointer(weights), pointer(values), len(values), pointer(result))
    return result


def expected(lses, sink=None, base=E):
    """The same in float64: each part's row is a unit vector, so that the output is the weights."""
    count = len(lses)
    output, lse = merge_states_reference(
        list(torch.eye(count, dtype=F64).reshape(count, 1, count)),
        list(lses.reshape(count, 1)),
        sink=None if sink is None else torch.tensor([sink], dtype=F64),
        lse_base=NAMES[base],
    )
    return output[0], lse


def expected_of_mixed(lses, bases, sink):
    """By decimal numbers: in float64 ln 2 times an LSE is known to its last digit alone."""
    ln = {E: Decimal(1), TWO: Decimal(2).ln()}
    parts = [
        Decimal(lse) * ln[base] if math.isfinite(lse) else None
        for lse, base in zip(lses.tolist(), bases, strict=True)
    ]
    seen = [x for x in (*parts, sink) if x is not None and math.isfinite(x)]
    if not seen:
        return torch.zeros(len(lses), dtype=F64), torch.tensor([-math.inf], dtype=F64)
    largest = max(map(Decimal, seen))
    total = sum((Decimal(x) - largest).exp() for x in seen)
    weights = [0.0 if x is None else float((x - largest).exp() / total) for x in parts]
    lse = float(largest + total.ln())
    return torch.tensor(weights, dtype=F64), torch.tensor([lse], dtype=F64)


def assert_as_expected(way, state, lses, **options):
    weights, lse = weigh(way, state, lses, **options)
    bases, sink, base = (options.get(name) for name in ("bases", "sink", "base"))
    if bases is not None:
        exact, exact_lse = expected_of_mixed(lses, bases, sink)
    else:
        exact, exact_lse = expected(lses, sink, base)
    bound = 4 * EPS[lses.dtype]
    seen = ~lses.isinf()
    if exact_lse.isnan():
        assert weights.isnan().all()
        assert lse.isnan()
        return
    assert (weights[~seen] == -1).all(), "an empty part is skipped"
    assert_within(weights[seen], exact[seen], torch.full_like(exact[seen], bound))
    assert_within(lse, exact_lse, bound * exact_lse.abs().clamp(min=1))


SPECIAL = (0.0, -0.0, 1.0, 88.0, -104.0, 1e5, -1e5, 3e38, -3e38, math.inf, -math.inf, math.nan)


@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
@pytest.mark.parametrize("base", [E, TWO])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("way", WAYS)
def test_every_combination(way, count, base, dtype, state):
    for lses in itertools.product(SPECIAL, repeat=count):
        assert_as_expected(way, state, torch.tensor(lses, dtype=dtype), base=base)


@st.composite
def calls(draw):
    """LSEs, natural or base 2, or mixed; as options of `weigh`."""
    dtype, mixed = draw(st.sampled_from([F32, F64])), draw(st.booleans())
    center = draw(st.sampled_from([0.0, 5.0, -90.0, 1e3, -1e5]))
    spread = draw(st.sampled_from([0.0, 1.0, 30.0, 200.0]))
    count = draw(st.sampled_from([1, 2, 3, 7, 16, 17, 33, 256, 1024]))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    lses = center + spread * torch.randn(count, generator=generator, dtype=F64)
    bases = torch.randint(0, 2, (count,), generator=generator) if mixed else None
    if mixed:
        lses = torch.where(bases == TWO, lses / math.log(2), lses)
    empty = torch.rand(count, generator=generator) < draw(st.sampled_from([0.0, 0.3]))
    lses[empty] = draw(st.sampled_from([math.inf, -math.inf]))
    return lses.to(dtype), {
        "bases": bases.tolist() if mixed else None,
        "sink": draw(st.sampled_from([None, center, -math.inf])),
        "base": E if mixed else draw(st.sampled_from([E, TWO])),  # mixed ones become natural
    }


@pytest.mark.parametrize("way", WAYS)
@given(call=calls())
def test_any_number_of_parts(call, way, state):
    lses, options = call
    assert_as_expected(way, state, lses, **options)


@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
@pytest.mark.parametrize("way", WAYS)
def test_two_weigh_what_the_pair_weighs(way, dtype, state):
    generator = torch.Generator().manual_seed(0)
    for lses in 40 * torch.randn(2000, 2, dtype=dtype, generator=generator):
        weights = torch.empty_like(lses)
        getattr(state, f"pair_{way}_{name_of(dtype)}")(pointer(lses), pointer(weights))
        assert_bits(weigh(way, state, lses)[0], weights)


@pytest.mark.parametrize("lse", [0.1, -0.0, 3e38])
@pytest.mark.parametrize("base", [E, TWO])
def test_the_lse_of_a_part_alone_is_what_it_was(lse, base, state):
    lses = torch.tensor([-math.inf, lse, math.inf])
    for way in WAYS:
        assert_bits(weigh(way, state, lses, base=base)[1], lses[1:2])


@pytest.mark.parametrize("dtype", [F32, F64], ids=name_of)
@pytest.mark.parametrize("count", [2, 16, 17, 256, 1024])
def test_a_sum_of_many_is_hardly_rounded_more_often(count, dtype, state):
    generator = torch.Generator().manual_seed(0)
    for _ in range(200):
        weights = torch.rand(count, dtype=dtype, generator=generator).add(0.5)
        weights /= weights.sum()
        # The worst are all alike: a sum in one go was 14 eps off at 1,024 parts.
        values = torch.rand(1, dtype=dtype, generator=generator).expand(count).contiguous()
        result = add_up(state, weights, values)
        products = zip(weights.tolist(), values.tolist(), strict=True)
        exact = math.fsum(weight * value for weight, value in products)
        assert abs(result.item() - exact) <= 8 * EPS[dtype] * values.max().item()


@pytest.mark.parametrize("zero", [0.0, -0.0])
def test_a_sum_keeps_the_sign_of_zero(zero, state):
    values = torch.tensor([zero])
    assert_bits(add_up(state, torch.ones(1), values), values)
