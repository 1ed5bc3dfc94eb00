"""Operands of many parts that are more or less than memory with strides."""

import re

import pytest
import torch
from states_support import States, check, everything, parts
from support import F32, OLDER_THAN_2_14, assert_bits, blank, refuses
from torch.utils._pytree import tree_map

import merge_attn_states
from merge_attn_states import merge_states, update_state

OPS = torch.ops.merge_attn_states
N, H, D, K = 4, 2, 8, 3


@pytest.fixture(autouse=True)
def by_the_operator(monkeypatch, request):
    """Where the fast path does not ask: a memory's size and laziness before PyTorch 2.14.

    And the sign of a tensor with a stride of 1, which it takes for a positive one.
    """
    kind = getattr(request.node, "callspec", None) and request.node.callspec.params.get("kind")
    for name in ("_fast_merge", "_fast_update"):
        if OLDER_THAN_2_14 or kind == "a view":
            monkeypatch.setattr(merge_attn_states.states, name, None)


def with_operand(states: States, name: str, change) -> States:
    """The call with what `change` makes of an operand, "lses[1]" say."""
    field, _, part = name.partition("[")
    operand = getattr(states, field)
    if not part:
        return states._replace(**{field: change(operand)})
    at = int(part[:-1])
    return states._replace(**{field: [change(x) if k == at else x for k, x in enumerate(operand)]})


# Memory with the sign still to be turned.

NEGATED = {
    "an imaginary part": lambda x: torch.complex(x, -x).conj().imag,
    "a view": lambda x: torch._neg_view(-x),
}


@pytest.mark.parametrize("in_place", [False, True])
@pytest.mark.parametrize("kind", NEGATED)
@pytest.mark.parametrize("name", ["outputs[0]", "outputs[2]", "lses[0]", "lses[1]", "sink"])
def test_a_negated_view_is_read_with_its_sign(name, kind, in_place, device):
    states = everything(device)
    states.sink.copy_(torch.randn(H))
    expected, expected_lse = states.run()
    negated = with_operand(states, name, NEGATED[kind])
    if in_place:
        negated = negated._replace(
            out=blank((N, H, D), F32, device), out_lse=blank((N, H), F32, device)
        )
    out, lse = negated.run()
    assert_bits(out, expected)
    assert_bits(lse, expected_lse)


@pytest.mark.parametrize("kind", NEGATED)
@pytest.mark.parametrize("name", ["outputs", "lses"])
def test_a_negated_stack_is_read_with_its_sign(name, kind, device):
    states = parts(device)
    states = States(torch.stack(states.outputs), torch.stack(states.lses), dim=0)
    expected, _ = states.run()
    out, _ = states._replace(**{name: NEGATED[kind](getattr(states, name))}).run()
    assert_bits(out, expected)


@pytest.mark.parametrize("kind", NEGATED)
@pytest.mark.parametrize("which", [2, 3])
def test_a_negated_block_is_read_with_its_sign(which, kind, device):
    states = parts(device)
    call = [states.outputs[0], states.lses[0], states.outputs[1], states.lses[1]]
    expected = [x.clone() for x in call]
    update_state(*expected)
    call[which] = NEGATED[kind](call[which])
    update_state(*call)
    assert_bits(call[0], expected[0])
    assert_bits(call[1], expected[1])


@pytest.mark.parametrize("kind", NEGATED)
@pytest.mark.parametrize("name", ["out", "out_lse", "state", "lse"])
def test_a_negated_view_is_no_result(name, kind, device):
    """Written as it is, it is wrong."""
    states = parts(device)
    is_output = name in ("out", "state")
    negated = NEGATED[kind](torch.ones((N, H, D) if is_output else (N, H), device=device))
    named = "out" if name == "state" else name
    with pytest.raises(ValueError, match=rf"^{named}: expected .*negative bit"):
        if name in ("out", "out_lse"):
            states._replace(**{name: negated}).run()
        elif is_output:
            update_state(negated, states.lses[0], states.outputs[1], states.lses[1])
        else:
            update_state(states.outputs[0], negated, states.outputs[1], states.lses[1])
    assert (negated == 1).all()


# No memory, too little, or memory that begins inside an element.

OPERANDS = ["outputs[0]", "outputs[1]", "lses[0]", "lses[2]", "index[1]", "empty[2]", "sink",
            "out", "out_lse"]  # fmt: skip


def taken_away(left, behind=False):
    def change(operand):
        mine = torch.stack([operand] * 2)[1] if behind else operand.clone()
        mine.untyped_storage().resize_(left)
        return mine

    return change


@pytest.mark.parametrize("left", [0, 2])  # bytes: all is gone, and too little is left
@pytest.mark.parametrize("name", OPERANDS)
def test_a_storage_that_was_taken_away(name, left):
    states = everything()._replace(out=blank((N, H, D), F32, "cpu"), out_lse=torch.empty(N, H))
    states = with_operand(states, name, taken_away(left))
    why = "memory, got a null data pointer" if left == 0 else "elements inside its memory of 2 "
    with refuses(ValueError, rf"^{re.escape(name)}: expected {why}"):
        states.run()
    assert name == "out" or states.out.isnan().all()


@pytest.mark.parametrize("name", OPERANDS)
def test_a_storage_taken_away_from_behind_an_offset(name):
    """Its pointer is not null but as far from it as the offset."""
    states = everything()._replace(out=blank((N, H, D), F32, "cpu"), out_lse=torch.empty(N, H))
    states = with_operand(states, name, taken_away(0, behind=True))
    with refuses(ValueError, rf"^{re.escape(name)}: expected memory, got a null data pointer"):
        states.run()
    assert name == "out" or states.out.isnan().all()


@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("name", ["outputs", "lses"])
@pytest.mark.parametrize("parts_left", [0, 1, 2])
def test_a_stack_that_lost_its_parts(parts_left, name, masked):
    states = parts()
    stack = {"outputs": torch.stack(states.outputs), "lses": torch.stack(states.lses)}
    nbytes = stack[name].untyped_storage().nbytes()
    stack[name].untyped_storage().resize_(nbytes // K * parts_left)
    masks = [torch.zeros(N, H, dtype=torch.bool)] * K if masked else None
    why = "elements inside its memory" if parts_left else "memory, got a null data pointer"
    with refuses(ValueError, rf"^{name}(\[\d\])?: expected {why}"):
        merge_states(**stack, dim=0, empty=masks)


@pytest.mark.parametrize("name", [x for x in OPERANDS if not x.startswith("empty")])
def test_an_address_inside_an_element(name):
    def odd(operand):
        memory = torch.zeros(operand.numel() * operand.element_size() + 8, dtype=torch.uint8)
        inside = torch.frombuffer(
            memory.numpy(), dtype=operand.dtype, offset=1, count=operand.numel()
        )
        return inside.view(operand.shape)

    states = everything()._replace(out=blank((N, H, D), F32, "cpu"), out_lse=torch.empty(N, H))
    states = with_operand(states, name, odd)
    size = 8 if name.startswith("index") else 4
    message = rf"^{re.escape(name)}: expected an address that is a multiple of {size} bytes"
    with pytest.raises(ValueError, match=message):
        states.run()


@pytest.mark.parametrize("make", [torch.Tensor.to_sparse, torch.Tensor.to_mkldnn], ids=repr)
@pytest.mark.parametrize("name", ["outputs[0]", "outputs[1]", "out"])
def test_layouts_without_strides(name, make):
    """PyTorch's dispatcher finds no kernel for them."""
    states = everything()._replace(out=torch.ones(N, H, D))
    with pytest.raises(NotImplementedError, match=r"^Could not run 'merge_attn_states::"):
        with_operand(states, name, lambda x: make(torch.ones(N, H, D))).run()


class Wrapped(torch.Tensor):
    """A tensor without memory of its own, as distributed ones are; it stands for another one."""

    @staticmethod
    def __new__(cls, inner):
        made = torch.Tensor._make_wrapper_subclass(
            cls, inner.shape, dtype=inner.dtype, strides=inner.stride(), device=inner.device
        )
        made.inner = inner
        return made

    @classmethod
    def __torch_dispatch__(cls, function, types, args=(), kwargs=None):
        args = tree_map(lambda x: x.inner if isinstance(x, Wrapped) else x, args)
        return function(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["outputs[0]", "outputs[1]", "lses[2]", "index[1]", "empty[2]",
                                  "sink"])  # fmt: skip
def test_a_subclass_that_wraps_another_tensor_is_asked(name):
    states = everything()
    expected, _ = states.run()
    out, _ = with_operand(states, name, Wrapped).run()
    assert_bits(out, expected)


def test_a_parameter(device):
    states = parts(device)
    states.outputs[1] = torch.nn.Parameter(states.outputs[1], requires_grad=False)
    check(states)
