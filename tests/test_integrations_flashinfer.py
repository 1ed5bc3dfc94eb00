"""FlashInfer's functions by this package: base 2, [N, H] LSEs, the mask, and the caller's names."""

import pytest
import torch
from conftest import CUDA
from states_support import States, check, compare, make_states
from support import BF16, E4M3, F16, F32, F64, INF, NAN, Recording, assert_bits

from merge_attn_states.integrations import flashinfer


def as_pair(outputs, lses, **_):
    return flashinfer.merge_state(outputs[0], lses[0], outputs[1], lses[1])


def in_place(outputs, lses, mask=None, **_):
    assert flashinfer.merge_state_in_place(outputs[0], lses[0], outputs[1], lses[1], mask) is None
    return outputs[0], lses[0]


def as_stack(outputs, lses, **_):
    return flashinfer.merge_states(outputs, lses)


def two(rows, head_size, dtype=BF16, device="cpu", **options) -> States:
    return make_states(rows, head_size, 2, dtype, device, base="2", **options)


def without(mask, states: States) -> States:
    """The same merge as many parts know it: the second part is empty where the mask is False."""
    return states._replace(empty=[None, ~mask[:, None].expand(states.lses[1].shape)])


# Theirs takes 64, 128, 256 and 512 elements, and at 128 in 16 bits at most 64 heads.
@pytest.mark.parametrize("head_size", [64, 72, 128, 512])
@pytest.mark.parametrize("num_heads", [1, 65])
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64, E4M3])
def test_merge_state(dtype, num_heads, head_size, device):
    check(two((5, num_heads), head_size, dtype, device), as_pair)


@pytest.mark.parametrize("center", [0.0, -88.0, 1e5])
def test_any_center(center, device):
    check(two((5, 3), 64, F32, device, center=center), as_pair)


def test_merge_state_in_place(device):
    for dtype in (F32, BF16, F64, (F32, BF16)):  # the last: a wide state beside 16-bit parts
        states = two((6, 5), 64, dtype, device)
        check(states._replace(out=states.outputs[0], out_lse=states.lses[0]), in_place)


@pytest.mark.parametrize("laid", ["whole", "strided", "one for all"])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_the_mask_says_which_tokens_are_merged(dtype, laid, device):
    states = two((7, 5), 64, dtype, device)
    mask = {
        "whole": torch.tensor([1, 0, 1, 1, 0, 0, 1], device=device).bool(),
        "strided": torch.tensor([1, 0, 1, 1, 0, 0, 1] * 2, device=device).bool()[::2],
        "one for all": torch.zeros(1, device=device).bool().expand(7),
    }[laid]
    states.outputs[1][~mask] = NAN
    before = states.clone()
    v, s = in_place(*states[:2], mask)
    compare(without(mask, before), v, s)
    kept = ~mask[:, None] & before.lses[0].isfinite()
    assert kept.any()
    assert_bits(v[kept], before.outputs[0][kept])
    assert_bits(s[kept], before.lses[0][kept])


def test_an_empty_state_needs_no_first_call(device):
    states = two((4, 3), 64, F32, device, empty=False)
    v, s = torch.full_like(states.outputs[0], NAN), torch.full_like(states.lses[0], -INF)
    for output, lse in zip(states.outputs, states.lses, strict=True):
        flashinfer.merge_state_in_place(v, s, output, lse)
    compare(states, v, s)


@pytest.mark.parametrize("num_states", [1, 2, 3, 100])  # 100 as in their example
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_merge_states(num_states, dtype, device):
    states = make_states((5, 3), 64, num_states, dtype, device, base="2")
    stack = States(torch.stack(states.outputs, 1), torch.stack(states.lses, 1), 1, lse_base="2")
    check(stack, as_stack)
    by_state = States(  # the same in memory of another order
        torch.stack(states.outputs).transpose(0, 1),
        torch.stack(states.lses).permute(1, 0, 2),
        1,
        lse_base="2",
    )
    assert_bits(as_stack(*by_state[:2])[0], as_stack(*stack[:2])[0])


def test_any_strides(device):
    """An LSE [H, N] transposed, heads wider than what is used, every other token."""
    states = two((6, 5), 64, BF16, device)
    lses = [lse.T.contiguous().T for lse in states.lses]
    wide = [torch.nn.functional.pad(output, (0, 16))[..., :64] for output in states.outputs]
    check(states._replace(outputs=wide, lses=lses), as_pair)
    half = states._replace(outputs=[x[::2] for x in wide], lses=[x[::2] for x in lses])
    check(half, as_pair)
    check(half._replace(out=half.outputs[0], out_lse=half.lses[0]), in_place)


def test_nothing_is_copied(device):
    states = two((6, 5), 64, BF16, device)
    lses = [lse.T.contiguous().T for lse in states.lses]
    mask = torch.ones(12, device=device).bool()[::2]
    stack = torch.stack(states.outputs).transpose(0, 1), torch.stack(lses).transpose(0, 1)
    with Recording() as recorded:
        as_pair(states.outputs, lses)
        in_place(states.outputs, lses, mask)
        as_stack(*stack)
    ran = [op._schema.name for op in recorded.seen if not op.is_view]
    assert [name for name in ran if name != "aten::new_empty"] == [
        "merge_attn_states::merge_states",
        "merge_attn_states::update_state",
        "merge_attn_states::merge_states",
    ]


PAIR = {"v_a": (4, 3, 64), "s_a": (4, 3), "v_b": (4, 3, 64), "s_b": (4, 3)}
IN_PLACE = {"v": (4, 3, 64), "s": (4, 3), "v_other": (4, 3, 64), "s_other": (4, 3)}
STACK = {"v": (4, 2, 3, 64), "s": (4, 2, 3)}
FUNCTIONS = {
    flashinfer.merge_state: PAIR,
    flashinfer.merge_state_in_place: IN_PLACE,
    flashinfer.merge_states: STACK,
}
ARGUMENTS = [(function, name) for function, shapes in FUNCTIONS.items() for name in shapes]


@pytest.mark.parametrize(("function", "name"), ARGUMENTS)
def test_an_error_names_the_callers_argument(function, name):
    operands = {key: torch.zeros(shape) for key, shape in FUNCTIONS[function].items()}
    before = {key: operand.clone() for key, operand in operands.items()}

    def call(wrong):
        function(**operands | {name: wrong})

    good = operands[name]
    if name.startswith("s"):
        with pytest.raises(ValueError, match=rf"^{name}: expected float32, .* got float16"):
            call(good.half())
        with pytest.raises(ValueError, match=rf"^{name}: expected shape .* = v\w*\.shape"):
            call(good.mT[..., :2])
    else:
        with pytest.raises(ValueError, match=rf"^{name}: .* got int32"):
            call(good.int())
    with pytest.raises(TypeError, match=rf"^{name}: expected .* got int"):
        call(1)
    for key, operand in operands.items():
        assert_bits(operand, before[key])


@pytest.mark.parametrize(
    ("mask", "error", "said"),
    [
        (torch.ones(5).bool(), ValueError, r"mask: expected \[num_tokens\] of v .* got \[5\]"),
        (
            torch.ones(4, 3).bool(),
            ValueError,
            r"mask: .* got \[4, 3\] beside \[4, 3, 64\]",
        ),
        (torch.ones(4).int(), ValueError, "mask: expected bool, got int32"),
        ([True] * 4, TypeError, r"mask: expected a torch.Tensor, got list"),
    ],
)
def test_a_wrong_mask_is_named(mask, error, said):
    operands = [torch.zeros(shape) for shape in IN_PLACE.values()]
    with pytest.raises(error, match=f"^{said}"):
        flashinfer.merge_state_in_place(*operands, mask)


@pytest.mark.parametrize("device", ["cpu", CUDA])
@pytest.mark.parametrize("grad_mode", [True, False])
def test_in_one_graph(grad_mode, device):
    states = two((6, 5), 64, BF16, device)
    mask = torch.tensor([1, 0, 1, 1, 0, 1], device=device).bool()

    def step(outputs, lses, mask):
        in_place(outputs, lses, mask)
        v, s = as_pair(outputs, lses)
        return as_stack(torch.stack([v, v], 1), torch.stack([s, s], 1))

    eager = states.clone()
    with torch.set_grad_enabled(grad_mode):
        expected = step(*eager[:2], mask)
        graph = torch.compile(step, backend="aot_eager", fullgraph=True)
        merged = graph(*states[:2], mask)
    for ours, theirs in zip((*merged, *states[0]), (*expected, *eager[0]), strict=True):
        assert_bits(ours, theirs)
