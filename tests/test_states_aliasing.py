"""Many parts in place: a result is exactly one of them, or lies between them in one buffer."""

import pytest
import torch
from states_support import States, check, make_states
from support import BF16, E4M3, F32, F64, assert_bits, place

OPS = torch.ops.merge_attn_states
N, H, D, K = 6, 4, 16, 3


def parts(device="cpu", dtype=F32, rows=(N, H), **options) -> States:
    return make_states(rows, D, K, dtype, device, empty=False, **options)


def shared(*shape, dtype=F32, device="cpu"):
    """A buffer of random values to cut operands from."""
    return place(torch.randn(shape).to(dtype), device)


# Exactly one part.


@pytest.mark.parametrize("dtype", [F32, BF16, E4M3, F64], ids=str)
@pytest.mark.parametrize("which", range(K))
def test_in_place_through_either_way(which, dtype, device):
    for k in range(K):
        states, by_op = parts(device, dtype), parts(device, dtype)
        check(states._replace(out=states.outputs[which], out_lse=states.lses[k]))
        OPS.merge_states_out(by_op.outputs[which], by_op.lses[k], by_op.outputs, by_op.lses, [], [])
        assert_bits(by_op.outputs[which], states.outputs[which])
        assert_bits(by_op.lses[k], states.lses[k])


@pytest.mark.parametrize("dim", [0, 1, 2])
def test_in_place_on_a_slice_of_a_stack(dim, device):
    for which in range(K):
        states = parts(device, BF16)
        stack, lses = torch.stack(states.outputs, dim), torch.stack(states.lses, dim)
        of_stack = States(stack, lses, dim=dim)
        check(of_stack._replace(out=stack.select(dim, which), out_lse=lses.select(dim, 2 - which)))


def test_in_place_on_a_part_of_a_stack_with_masks(device):
    states = parts(device)
    stack, lses = torch.stack(states.outputs), torch.stack(states.lses)
    masks = [None, torch.rand(N, H, device=device) < 0.5, None]
    check(States(stack, lses, dim=0, empty=masks, out=stack[1], out_lse=lses[2]))


def test_every_part_is_the_same_memory(device):
    one = parts(device)
    output, lse = one.outputs[0], one.lses[0]
    check(States([output] * K, [lse] * K, out=output, out_lse=lse))
    one = parts(device)
    output, lse = one.outputs[1], one.lses[1]
    expanded = States(output.expand(K, N, H, D), lse.expand(K, N, H), dim=0)
    check(expanded._replace(out=output, out_lse=lse))


def test_strides_of_size_1_mean_nothing(device):
    states = parts(device, rows=(1, H))
    output, lse = states.outputs[1], states.lses[1]
    odd = output.as_strided((1, H, D), (7, D, 1), output.storage_offset())
    odd_lse = lse.as_strided((1, H), (0, 1), lse.storage_offset())
    check(states._replace(out=odd, out_lse=odd_lse))


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("of_parts", [False, True])
def test_a_trailing_1_is_no_difference(of_parts, own, device):
    states = parts(device)
    lses = [lse[..., None] if of_parts else lse for lse in states.lses]
    out_lse = states.lses[1][..., None] if own else states.lses[1]
    check(states._replace(lses=lses, out=states.outputs[1], out_lse=out_lse))


# Views of one buffer that have nothing in common.

DISJOINT = {
    "even and odd tokens": lambda b: (b(2 * N, H, D)[::2], b(2 * N, H, D)[1::2]),
    "halves of the tokens": lambda b: (b(2 * N, H, D)[:N], b(2 * N, H, D)[N:]),
    "groups of heads": lambda b: (b(N, 2 * H, D)[:, H:], b(N, 2 * H, D)[:, :H]),
    "halves of a wide head": lambda b: (b(N, H, 2 * D)[..., :D], b(N, H, 2 * D)[..., D:]),
    "even and odd elements": lambda b: (b(N, H, 2 * D)[..., ::2], b(N, H, 2 * D)[..., 1::2]),
}


@pytest.mark.parametrize("cut", DISJOINT)
@pytest.mark.parametrize("which", [0, 2])
def test_disjoint_views_of_one_buffer(which, cut, device):
    states = parts(device)
    out, states.outputs[which] = DISJOINT[cut](shared(2 * N * H * D, device=device).view)
    check(states._replace(out=out))


def test_an_lse_behind_the_values_of_its_row(device):
    """[N, H, D + 1]: of a part, of the result, and of a stack with one in place."""
    rows = shared(K + 1, N, H, D + 1, device=device)
    values, lses = rows[..., :D], rows[..., D]
    check(States(list(values[:K]), list(lses[:K]), out=values[K], out_lse=lses[K]))
    check(States(values[1:], lses[1:], dim=0, out=values[0], out_lse=lses[0]))
    check(States(values[1:], lses[1:], dim=0, out=values[2], out_lse=lses[2]))
