"""What else is refused of many parts: stacks, numbers of parts, operands on two devices."""

import re
from functools import partial

import pytest
import torch
from states_support import make_states, operator_args
from support import E4M3, F16, F32, OPERATOR_ERROR, assert_bits, blank

from merge_attn_states import merge_states

OPS = torch.ops.merge_attn_states
N, H, D, K = 4, 2, 8, 3


def zeros(*shape, dtype=F32):
    return torch.zeros(shape, dtype=dtype)


def states_of(device="cpu", **options):
    states = make_states((N, H), D, K, F32, device, empty=False, **options)
    return states._replace(out=blank((N, H, D), F32, device), out_lse=blank((N, H), F32, device))


def is_untouched(states) -> bool:
    return bool(states.out.isnan().all() and states.out_lse.isnan().all())


# A stack.

MASKS = [None, None, zeros(N, H, dtype=torch.bool)]
STACKS = [
    ({"dim": -1}, "dim: expected a row dimension of outputs, in [0, 2], got -1"),
    ({"dim": 3}, "dim: expected a row dimension of outputs, in [0, 2], got 3"),  # head_size
    ({"dim": 4}, "dim: expected a row dimension of outputs, in [0, 2], got 4"),
    ({"dim": 2**31}, f"dim: expected a row dimension of outputs, in [0, 2], got {2**31}"),
    ({"dim": 2**32}, f"dim: expected a row dimension of outputs, in [0, 2], got {2**32}"),
    ({"dim": -(2**32)}, f"dim: expected a row dimension of outputs, in [0, 2], got {-(2**32)}"),
    ({"dim": 3, "empty": MASKS}, "dim: expected a row dimension of outputs, in [0, 2], got 3"),
    ({"outputs": zeros(K, D), "lses": zeros(K)},
     "outputs: expected 3 to 6 dimensions [*rows, head_size] and one of the parts, "
     "got shape [3, 8]"),
    ({"outputs": zeros(K, 1, 1, 1, N, H, D), "lses": zeros(K, 1, 1, 1, N, H)},
     "outputs: expected 3 to 6 dimensions [*rows, head_size] and one of the parts, "
     "got shape [3, 1, 1, 1, 4, 2, 8]"),
    ({"lses": zeros(K - 1, N, H)},
     "lses: expected shape [3, 4, 2] = outputs.shape[:-1], got [2, 4, 2]"),
    ({"lses": zeros(K - 1, N, H), "empty": MASKS},
     "lses: expected shape [3, 4, 2] = outputs.shape[:-1], got [2, 4, 2]"),
    ({"lses": zeros(N, K, H)},
     "lses: expected shape [3, 4, 2] = outputs.shape[:-1], got [4, 3, 2]"),
    ({"lses": zeros(N, H)}, "lses: expected shape [3, 4, 2] = outputs.shape[:-1], got [4, 2]"),
    ({"out": zeros(K, N, H, D)},
     "out: expected shape [4, 2, 8] = outputs.shape without dimension 0, got [3, 4, 2, 8]"),
    ({"outputs": zeros(0, N, H, D), "lses": zeros(0, N, H)},
     "outputs: expected 1 to 1024 parts along dimension 0, got shape [0, 4, 2, 8]"),
    ({"outputs": zeros(1025, 1, 1), "lses": zeros(1025, 1)},
     "outputs: expected 1 to 1024 parts along dimension 0, got shape [1025, 1, 1]"),
    ({"outputs": zeros(K, N, H, D, dtype=torch.int32)},
     "outputs: expected float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2, "
     "got int32"),
    ({"lses": zeros(K, N, H, dtype=F16)},
     "lses: expected float32, the dtype of every LSE, got float16"),
    ({"empty": MASKS[:2]}, "empty: expected a tensor or None for each of 3 parts, got 2"),
    ({"index": [None] * 4}, "index: expected a tensor or None for each of 3 parts, got 4"),
    ({"empty": [None, zeros(H, N, dtype=torch.bool), None]},
     "empty[1]: expected shape [4, 2] = outputs[1].shape[:-1], got [2, 4]"),
    ({"lse_base": ["e", "2"]},
     'lse_base: expected "e" or "2", or one of them for each of 3 parts, got "e2"'),
]  # fmt: skip


@pytest.mark.parametrize("way", ["python", "torch.ops"])
@pytest.mark.parametrize(("changes", "message"), STACKS)
def test_a_stack_is_refused(changes, message, way, device):
    states = states_of(device)
    stack = {"outputs": torch.stack(states.outputs), "lses": torch.stack(states.lses), "dim": 0}
    to = {name: x.to(device) if torch.is_tensor(x) else x for name, x in changes.items()}
    if "empty" in to:
        to["empty"] = [None if mask is None else mask.to(device) for mask in to["empty"]]
    states = states._replace(**stack | to)
    before = states.out.clone()
    kind = ValueError if way == "python" else OPERATOR_ERROR
    with pytest.raises(kind, match=f"^{re.escape(message)}$"):
        if way == "python":
            states.run()
        else:
            OPS.merge_states_out(states.out, states.out_lse, *operator_args(states))
    assert_bits(states.out, before)
    assert states.out_lse.isnan().all()


def test_a_stack_has_a_base_for_each_part_as_a_list_has(device):
    states = states_of(device, base=["e", "2", "2"], out_lse_base="e")
    listed, listed_lse = states._replace(out=None, out_lse=None).run()
    stacked = states._replace(outputs=torch.stack(states.outputs), lses=torch.stack(states.lses))
    out, lse = stacked._replace(dim=0).run()
    assert_bits(out, listed)
    assert_bits(lse, listed_lse)


def test_a_list_for_a_stack_by_the_operator():
    states = states_of()
    message = r"^outputs: expected one tensor with its parts along dim, got 3$"
    with pytest.raises(OPERATOR_ERROR, match=message):
        OPS.merge_states_out(states.out, states.out_lse, states.outputs, states.lses, [], [], 0)
    assert is_untouched(states)


@pytest.mark.parametrize(
    ("count", "dim", "message"),
    [
        (0, None, "outputs: expected one part or more, got 0"),
        (1, 99, "dim: expected a row dimension of outputs, in [0, 2], got 99"),
        (1, -5, "dim: expected a row dimension of outputs, in [0, 2], got -5"),
    ],
)
def test_a_backward_call_by_the_operator(count, dim, message):
    outputs, lses = [zeros(K, N, H, D)] * count, [zeros(K, N, H)] * count
    with pytest.raises(OPERATOR_ERROR, match=f"^{re.escape(message)}"):
        OPS.merge_states_backward(zeros(N, H, D), None, outputs, lses, [], [], dim, None, "e", None)


# How many there may be, on both sides of each limit.

ANY = r"parts that differ in dtype, base or strides or have an index or a mask \(and 1024 that do"


UNLIKE = {  # and whether a part of that kind is alike all the same
    "a dtype": ({"outputs": lambda zeros: zeros(1, 2).half()}, False),
    "a base": ({"base": "2"}, False),
    "a mask": ({"empty": lambda zeros: zeros(1) == 1}, False),
    "a stride of elements": ({"outputs": lambda zeros: zeros(1, 4)[:, ::2]}, False),
    "a stride of rows": (
        {"outputs": lambda zeros: zeros(2, 4)[::2, :2], "lses": lambda zeros: zeros(2)[::2]},
        True,
    ),
    "an LSE with a trailing 1": ({"lses": lambda zeros: zeros(1, 1)}, True),
}


@pytest.mark.parametrize("kind", UNLIKE)
def test_parts_that_differ_in(kind, device):
    """What a dimension of size 1 is stepped over by means nothing."""
    unlike, is_alike = UNLIKE[kind]
    zeros = partial(torch.zeros, device=device)

    def run(count):
        at = count - 1
        states = make_states((1,), 2, count, F32, device, empty=False, out_lse_base="e")
        for name in ("outputs", "lses"):
            if name in unlike:
                getattr(states, name)[at] = unlike[name](zeros)
        if "base" in unlike:
            states = states._replace(lse_base=["e"] * at + ["2"])
        if "empty" in unlike:
            states = states._replace(empty=[None] * at + [unlike["empty"](zeros)])
        return states.run()

    run(200)
    if is_alike:
        run(201)
        return
    with pytest.raises(ValueError, match=rf"^outputs: expected at most 200 {ANY} not\), got 201$"):
        run(201)


def test_parts_with_an_index(device):
    index = torch.zeros(1, dtype=torch.int32, device=device)
    for count in (200, 201):
        states = make_states((1, 1), 1, count, F32, device, empty=False)
        states = states._replace(index=[None] * (count - 1) + [index])
        if count == 200:
            states.run()
            continue
        with pytest.raises(ValueError, match=rf"^outputs: expected at most 200 {ANY} not\), got 2"):
            states.run()


def test_parts_that_are_alike(device):
    make_states((1,), 1, 1024, F32, device, empty=False).run()
    states = make_states((1,), 1, 1025, F32, device, empty=False)
    with pytest.raises(ValueError, match=r"^outputs: expected at most 1024 parts, got 1025$"):
        states.run()
    stacked = torch.stack(states.outputs), torch.stack(states.lses)
    merge_states(stacked[0][1:], stacked[1][1:], dim=0)
    nothing = [None] * 1024
    merge_states(stacked[0][1:], stacked[1][1:], dim=0, empty=nothing, index=nothing)
    masks = [torch.zeros(1, dtype=torch.bool, device=device), *[None] * 200]
    with pytest.raises(ValueError, match=rf"^outputs: expected at most 200 {ANY} not\), got 201$"):
        merge_states(stacked[0][:201], stacked[1][:201], dim=0, empty=masks)


def test_too_many_parts_are_not_told_apart_first(device):
    """One element of memory can be as many parts as one likes."""
    huge = torch.zeros(1, 1, device=device).expand(10**9, 1, 1)
    mask = torch.zeros(1, dtype=torch.bool, device=device)
    with pytest.raises(
        OPERATOR_ERROR, match=r"outputs: expected 1 to 1024 parts along dimension 0, got"
    ):
        OPS.merge_states([huge], [huge[..., 0]], [], [mask], 0)


# Devices.

OPERANDS = ["outputs[0]", "outputs[2]", "lses[0]", "lses[1]", "index[1]", "empty[2]", "sink",
            "out", "out_lse", "out_scale"]  # fmt: skip


def with_one_on(name, there, device):
    """A legal call but for one operand, which is on another device."""
    states = states_of(device)._replace(
        out=blank((N, H, D), E4M3, device),
        out_scale=torch.ones((), device=device),
        sink=torch.zeros(H, device=device),
        index=[None, torch.arange(N, device=device), None],
        empty=[None, None, torch.zeros(N, H, dtype=torch.bool, device=device)],
    )
    field, _, part = name.partition("[")
    operand = getattr(states, field)
    if not part:
        return states._replace(**{field: operand.to(there)})
    operand = list(operand)
    operand[int(part[:-1])] = operand[int(part[:-1])].to(there)
    return states._replace(**{field: operand})


@pytest.mark.parametrize("name", OPERANDS)
def test_a_meta_operand_among_real_ones(name, device):
    """It would otherwise return and do nothing. The others are held against outputs[0]."""
    states = with_one_on(name, "meta", device)
    here = str(states.lses[2].device)
    message = (
        rf"^{re.escape(name)}: expected device {here}(, the device of outputs\[0\])?, got meta$"
    )
    if name == "outputs[0]":  # whichever other one is held against it first
        message = f": expected device (meta|{here})(, the device of .*)?, got (meta|{here})$"
    with pytest.raises(ValueError, match=message):
        states.run()
    assert name == "out" or (states.out.view(torch.int8) == -1).all()


@pytest.mark.parametrize("name", OPERANDS)
def test_a_cpu_operand_among_cuda_ones(name, cuda):
    states = with_one_on(name, "cpu", cuda)
    message = f"{name}: expected device cuda:0, the device of outputs[0], got cpu"
    if name == "outputs[0]":
        message = "lses[0]: expected device cpu, the device of outputs[0], got cuda:0"
    with pytest.raises(ValueError, match=f"^{re.escape(message)}$"):
        states.run()
    assert name == "out" or (states.out.view(torch.int8) == -1).all()


def test_a_meta_output_alone(device):
    """What the caller did not give is not named."""
    states = states_of(device)._replace(out=torch.empty(N, H, D, device="meta"), out_lse=None)
    with pytest.raises(ValueError, match=r"^out: expected device .*, got meta$"):
        states.run()
