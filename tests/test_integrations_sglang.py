"""SGLang's functions by this package: [N, H] LSEs in natural log, given results, names."""

import pytest
import torch
from states_support import States, check, make_states
from support import BF16, E4M3, E5M2, F16, F32, F64, INF, NAN, assert_bits

from merge_attn_states.integrations import sglang

NAMES = {
    sglang.merge_state_v2: ("v_a", "s_a", "v_b", "s_b", "v_merged", "s_merged"),
    sglang.merge_state: (
        *("prefix_output", "prefix_lse", "suffix_output", "suffix_lse", "output", "output_lse"),
    ),
}


@pytest.fixture(params=NAMES, ids=lambda function: function.__name__)
def function(request):
    return request.param


def by(function):
    """As merge_states is called, in the caller's names."""

    def run(outputs, lses, out=None, out_lse=None, **_):
        given = (outputs[0], lses[0], outputs[1], lses[1], out, out_lse)
        return function(**dict(zip(NAMES[function], given, strict=True)))

    return run


# v2 needs multiples of 16 bytes; 65 heads of 128 are where a block of a token's heads ends.
@pytest.mark.parametrize("head_size", [64, 72, 77, 128])
@pytest.mark.parametrize("num_heads", [1, 65])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64, E4M3, E5M2])
def test_merge(function, dtype, num_heads, head_size, device):
    check(make_states((5, num_heads), head_size, 2, dtype, device), by(function))


def test_results_that_are_given(function, device):
    states = make_states((6, 5), 64, 2, BF16, device)
    out = torch.empty_like(states.outputs[0])
    out_lse = torch.empty(5, 6, device=device).T
    given = check(states._replace(out=out, out_lse=out_lse), by(function))
    assert given[0] is out
    assert given[1] is out_lse
    _, lse = check(states._replace(out=out), by(function))
    assert_bits(lse, out_lse)
    # into the parts, as a loop over chunks does
    check(states._replace(out=states.outputs[1], out_lse=states.lses[1]), by(function))


def test_flash_attentions_lse_without_a_copy(function, device):
    states = make_states((6, 5), 64, 2, BF16, device)
    expected = check(states, by(function))
    by_head = [lse.T.contiguous() for lse in states.lses]  # [H, N]
    merged = check(states._replace(lses=[lse.T for lse in by_head]), by(function))
    for one, other in zip(merged, expected, strict=True):
        assert_bits(one, other)


def test_nobody(function, device):
    empty = torch.full((2, 3), INF, device=device)
    values = torch.full((2, 3, 64), NAN, device=device)
    out, lse = by(function)([values, values], [empty, -empty])
    assert (out == 0).all()
    assert (lse == -INF).all()


@pytest.mark.parametrize("which", range(6))
def test_an_error_names_the_callers_argument(function, which):
    states = make_states((4, 3), 64, 2, F32, empty=False)
    given = [*zip(*states[:2], strict=True)]
    operands = [*given[0], *given[1], torch.zeros(4, 3, 64), torch.zeros(4, 3)]
    name = NAMES[function][which]
    good = operands[which]
    if which in (1, 3, 5):
        operands[which] = good.half()
        with pytest.raises(ValueError, match=rf"^{name}: expected float32, .* got float16"):
            function(*operands)
    if which > 0:  # the first has the shape that all others must have
        operands[which] = good[:3]
        with pytest.raises(ValueError, match=rf"^{name}: expected shape .* got \[3, "):
            function(*operands)
    operands[which] = 1
    with pytest.raises(TypeError, match=rf"^{name}: expected a torch.Tensor"):
        function(*operands)


def test_what_is_said_of_two_arguments_names_both(function):
    states = make_states((4, 3), 64, 2, F32)
    names = NAMES[function]
    shifted = states.outputs[0].flatten()[: 3 * 3 * 64].view(3, 3, 64)
    parts = States([states.outputs[0][1:], shifted], [lse[1:] for lse in states.lses])
    with pytest.raises(ValueError, match=rf"{names[4]}.*{names[0]}|{names[0]}.*{names[4]}"):
        parts._replace(out=shifted).run(by(function))
