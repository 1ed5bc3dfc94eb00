"""The merged LSE as a GPU computes it: next to the exact one, on the host and on the GPU itself."""

import ctypes

import pytest
import torch
from support import BF16, F32, F64, Call, compiled, half_ulp

from merge_attn_states import merge_attn_states as merge

CLOSENESS = 4.5e-8  # beyond the last rounding: csrc/core/log_sum_exp.h
ROWS, HEADS = 8192, 16
SPREADS = [(0, 1), (0, 40), (3, 1), (33, 1), (-200, 5), (1000, 3)]  # mean, standard deviation

SOURCE = """
#include "core/log_sum_exp.h"
extern "C" void log_sum_exps(const float* larger, const float* smaller, const float* e, float* lse,
                             long count) {
  for (long i = 0; i < count; ++i) {
    lse[i] = merge_attn_states::precise_log_sum_exp(larger[i], smaller[i], e[i], 1 / (1 + e[i]));
  }
}
"""


def random_lses(mean, deviation, device="cpu"):
    random = torch.Generator().manual_seed(1)
    return (mean + deviation * torch.randn(2, HEADS, ROWS, generator=random)).to(device)


def assert_next_to_exact(lse, parts):
    exact = torch.logaddexp(*parts.to(F64))
    beyond = (lse.to(F64) - exact).abs() - half_ulp(exact.abs(), F32)
    assert beyond.max() < CLOSENESS


@pytest.fixture(scope="module")
def log_sum_exps(tmp_path_factory):
    function = compiled(tmp_path_factory.mktemp("log_sum_exp"), SOURCE).log_sum_exps
    function.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_long]

    def compute(larger, smaller, e):
        lse = torch.empty_like(larger)
        function(*(x.data_ptr() for x in (larger, smaller, e, lse)), larger.numel())
        return lse

    return compute


@pytest.mark.parametrize("ulps", [-2, -1, 0, 1, 2])
@pytest.mark.parametrize(("mean", "deviation"), SPREADS)
def test_formula(mean, deviation, ulps, log_sum_exps):
    """Whichever way the exponential that it is given was rounded."""
    parts = random_lses(mean, deviation)
    larger, smaller = parts.amax(0), parts.amin(0)
    e = (smaller - larger).to(F64).exp().to(F32)
    for _ in range(abs(ulps)):
        e = torch.nextafter(e, torch.full_like(e, torch.inf if ulps > 0 else 0.0))
    e = e.clamp(max=1)
    lse = log_sum_exps(larger, smaller, e)
    real = e > 0  # what state.h leaves to it
    assert_next_to_exact(lse[real], torch.stack([larger[real], smaller[real]]))


def test_formula_where_the_difference_is_none_or_no_number(log_sum_exps):
    same = torch.tensor([0.0, 1.0, -87.0, 1e30])
    lse = log_sum_exps(same, same, torch.ones(4))
    assert_next_to_exact(lse, torch.stack([same, same]))
    nan = torch.tensor([float("nan")])
    assert log_sum_exps(nan, nan, nan).isnan().all()
    one = torch.ones(1)
    assert log_sum_exps(one, nan, nan).isnan().all()
    assert log_sum_exps(nan, one, nan).isnan().all()


@pytest.mark.parametrize("head_size", [8, 7])  # vectorized, generic
@pytest.mark.parametrize(("mean", "deviation"), SPREADS)
def test_on_the_gpu(mean, deviation, head_size, cuda):
    parts = random_lses(mean, deviation, cuda)
    output = torch.zeros(ROWS, HEADS, head_size, device=cuda, dtype=BF16)
    call = Call(
        output=output,
        prefix_output=output.clone(),
        prefix_lse=parts[0],
        suffix_output=output.clone(),
        suffix_lse=parts[1],
        output_lse=torch.empty_like(parts[0]),
    )
    merge(*call)
    assert_next_to_exact(call.output_lse, parts)
