"""What partly shares memory with an output is refused; disjoint views of one buffer are merged."""

import itertools

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support import (
    BF16,
    E4M3,
    F16,
    F32,
    F64,
    LSES,
    ROWS,
    Call,
    assert_bits,
    blank,
    check,
    cloned,
    compare,
    make_call,
    place,
    refusal_of,
)

from merge_attn_states import merge_attn_states as merge

SIDES = ("prefix", "suffix")


def shared(*shape, dtype=F32, device="cpu"):
    """A buffer of random values to cut operands from."""
    return place(torch.randn(shape).to(dtype), device)


# Disjoint views of one buffer: [kind of cut, output, part], shapes [6, 4, 64].
DISJOINT = {
    "even and odd tokens": lambda b: (b(12, 4, 64)[::2], b(12, 4, 64)[1::2]),
    "two halves of the tokens": lambda b: (b(12, 4, 64)[:6], b(12, 4, 64)[6:]),
    "two groups of heads": lambda b: (b(6, 8, 64)[:, 4:], b(6, 8, 64)[:, :4]),
    "even and odd heads": lambda b: (b(6, 8, 64)[:, ::2], b(6, 8, 64)[:, 1::2]),
    "two halves of a wide head": lambda b: (b(6, 4, 128)[..., :64], b(6, 4, 128)[..., 64:]),
    "even and odd elements": lambda b: (b(6, 4, 128)[..., ::2], b(6, 4, 128)[..., 1::2]),
    "heads first, interleaved": lambda b: (
        b(8, 6, 64)[::2].transpose(0, 1), b(8, 6, 64)[1::2].transpose(0, 1),
    ),
}  # fmt: skip


@pytest.mark.parametrize("dtype", [F32, BF16, E4M3], ids=str)
@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("cut", DISJOINT)
def test_disjoint_views_of_one_buffer(cut, side, dtype, device, entry):
    buffer = shared(12 * 4 * 64, dtype=dtype, device=device)
    output, part = DISJOINT[cut](buffer.view)
    call = make_call((6, 4, 64), dtype, device, empty=False)
    check(call._replace(output=output, **{f"{side}_output": part}), entry)


def test_disjoint_lse_views_of_one_buffer(device, entry):
    call = make_call((6, 4, 64), F32, device, empty=False)
    lse = shared(4, 18, device=device)
    check(
        call._replace(output_lse=lse[:, ::3], prefix_lse=lse[:, 1::3], suffix_lse=lse[:, 2::3]),
        entry,
    )


def test_an_output_and_its_lse_in_one_row(device, entry):
    """[N, H, D + 1] storage: the LSE behind the values of its row."""
    call = make_call((6, 4, 64), F32, device, empty=False)
    buffer = shared(6, 4, 65, device=device)
    check(call._replace(output=buffer[..., :64], output_lse=buffer[..., 64].T), entry)


OVERLAPS = {
    "one token later": lambda b: {"output": b[4:10], "prefix_output": b[5:11]},
    "one element later": lambda b: {
        "output": b.view(-1)[:1536].view(6, 4, 64),
        "suffix_output": b.view(-1)[1:1537].view(6, 4, 64),
    },
    "the same bytes, heads first": lambda b: {
        "output": b.view(-1)[:1536].view(6, 4, 64),
        "suffix_output": b.view(-1)[:1536].view(4, 6, 64).transpose(0, 1),
    },
    "an expanded part": lambda b: {"output": b[:6], "prefix_output": b[3:4].expand(6, 4, 64)},
    "the last byte only": lambda b: {
        "output": b.view(-1)[:1536].view(6, 4, 64),
        "prefix_output": b.view(-1)[1535:3071].view(6, 4, 64),
    },
    "an lse inside the output": lambda b: {"output": b[:6], "prefix_lse": b[5, :, 58:]},
    "the scale inside the output": lambda b: {
        "output": b.view(-1)[:384].view(E4M3).view(6, 4, 64), "output_scale": b[0, 1, 17],
    },
    "output_lse inside the output": lambda b: {"output": b[:6], "output_lse": b[2, :, :6]},
    "output_lse inside a part": lambda b: {"output_lse": b[2, :, :6], "suffix_output": b[:6]},
    "output_lse over the other lse": lambda b: {
        "output_lse": b[0, :, :6], "suffix_lse": b[0, :, 1:7],
    },
    "output_lse over the scale": lambda b: {
        "output_lse": b[0, :, :6], "output_scale": b[0, 2, 3],
        "output": blank((6, 4, 64), E4M3, b.device),
    },
    "one lse transposed": lambda b: {
        "output_lse": b.view(-1)[:24].view(4, 6), "prefix_lse": b.view(-1)[:24].view(6, 4).T,
    },
    "an expanded output": lambda b: {"output": b[:1].expand(6, 4, 64)},
    "an output of overlapping rows": lambda b: {"output": b.as_strided((6, 4, 64), (256, 63, 1))},
    "an expanded output_lse": lambda b: {"output_lse": b[0, :, :1].expand(4, 6)},
    "an output_lse of overlapping rows": lambda b: {"output_lse": b.as_strided((4, 6), (5, 1))},
}  # fmt: skip


@pytest.mark.parametrize("case", OVERLAPS)
def test_a_provable_overlap_is_refused(case, device, entry):
    buffer = shared(12, 4, 64, device=device)
    operands = OVERLAPS[case](buffer)
    call = make_call((6, 4, 64), F32, device, empty=False)._replace(**operands)
    before = buffer.clone()
    name = "output_lse" if "output_lse" in operands else "output"
    with pytest.raises(refusal_of(entry), match=rf"^{name}: "):
        entry(*call)
    assert torch.equal(buffer, before)


# What an output overlaps, in some cases of each kind.
OVERLAPPED = {
    "one token later": "an input",
    "an lse inside the output": "an input",
    "output_lse inside the output": "an output",
    "an expanded output": "itself",
    "an output of overlapping rows": "itself",
}


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad mode", "no_grad"])
@pytest.mark.parametrize("case", OVERLAPPED)
def test_a_provable_overlap_through_every_way(case, grad_mode, way):
    """aot_eager gives the operator copies of what it writes: an input is no longer overlapped, and
    is read as it was. Only the Python function in grad mode shows it the operands themselves.
    """
    buffer = shared(12, 4, 64)
    operands = OVERLAPS[case](buffer)
    call = make_call((6, 4, 64), F32, empty=False)._replace(**operands)
    before, inputs = buffer.clone(), cloned(call)

    def step(*args):
        way.merge(*args)

    copies = way.backend == "aot_eager" and not (grad_mode and way.merge is merge)
    with torch.set_grad_enabled(grad_mode):
        if copies and OVERLAPPED[case] == "an input":
            way.run(step)(*call)
            compare(inputs, call.output, call.output_lse)
            return
        name = "output_lse" if "output_lse" in operands else "output"
        refusal = rf"\b{name}: expected (no memory in common with|memory of its own for each)"
        with pytest.raises((ValueError, RuntimeError), match=refusal):
            way.run(step)(*call)
    assert torch.equal(buffer, before)


@pytest.mark.parametrize("grad_mode", [True, False], ids=["grad mode", "no_grad"])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_an_output_that_a_graph_of_any_size_expands_is_named(backend, grad_mode):
    def step(one, *args):
        merge(one.expand(args[0].shape[0], -1, -1), *args)

    torch._dynamo.reset()
    call = make_call((6, 4, 64), F32)[1:5]
    run = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    refusal = "output: expected memory of its own for each element"
    with torch.set_grad_enabled(grad_mode), pytest.raises(RuntimeError, match=refusal):
        run(blank((1, 4, 64), F32, "cpu"), *call)


@pytest.mark.parametrize("count", [None, 0])
@pytest.mark.parametrize("side", SIDES)
def test_two_that_begin_at_one_address_overlap(side, count, device, entry):
    """However their strides hide it: the library's search for a common byte gives up on these."""
    shape, strides = (5, 15, 38), ((1189, 1352, 1054), (2531, 877, 1934))
    buffer = torch.full((100_000,), float("nan"), device=device)
    output, part = (buffer.as_strided(shape, own) for own in strides)
    call = make_call(shape, F32, device, count=count, empty=False)
    with pytest.raises(
        refusal_of(entry), match=rf"^output: .* in common with {side}_output .* overlap"
    ):
        entry(*call._replace(output=output, **{f"{side}_output": part}))
    assert buffer.isnan().all()


@pytest.mark.parametrize("side", SIDES)
def test_the_same_memory_with_other_strides_is_refused_where_every_row_takes_the_suffix(
    side, device, entry
):
    """A kernel that took it for in place would write nothing, and the rows would be in disorder."""
    call = make_call((6, 6, 64), F32, device, count=0, empty=False)
    part, lse = getattr(call, f"{side}_output"), getattr(call, f"{side}_lse")
    for name, operand in (("output", part), ("output_lse", lse)):
        before = operand.clone()
        with pytest.raises(
            refusal_of(entry), match=rf"^{name}: .* in common with {side}_.* partial"
        ):
            entry(*call._replace(**{name: operand.transpose(0, 1)}))
        assert_bits(operand, before)


def byte_addresses(tensor: torch.Tensor) -> list[int]:
    """The address of every byte of every element: brute force, the oracle of the property."""
    elements = [
        tensor.data_ptr() + tensor.element_size() * sum(map(int.__mul__, index, tensor.stride()))
        for index in itertools.product(*map(range, tensor.shape))
    ]
    return [element + byte for element in elements for byte in range(tensor.element_size())]


def is_exact_alias(a: torch.Tensor, b: torch.Tensor) -> bool:
    steps = [
        [(size, stride) for size, stride in zip(t.shape, t.stride(), strict=True) if size > 1]
        for t in (a, b)
    ]
    return a.dtype == b.dtype and a.data_ptr() == b.data_ptr() and steps[0] == steps[1]


def refused_operand(call: Call) -> str | None:
    """The output for whose sake the call must be refused; None where it must be merged."""
    allowed = {"output": ROWS[1:], "output_lse": LSES[:2]}
    for written, same in allowed.items():
        tensor = getattr(call, written)
        own = byte_addresses(tensor)
        if len(set(own)) < len(own):
            return written
        for name, other in call._asdict().items():
            # What the two outputs share is said of the second.
            if name in (written, "output_lse") or not isinstance(other, torch.Tensor):
                continue
            if name in same and is_exact_alias(tensor, other):
                continue
            if not set(own).isdisjoint(byte_addresses(other)):
                return written
    return None


PAIRS = [
    ("output", "prefix_output"), ("output", "suffix_output"), ("output", "prefix_lse"),
    ("output", "suffix_lse"), ("output", "output_lse"), ("output_lse", "prefix_lse"),
    ("output_lse", "suffix_lse"), ("output_lse", "suffix_output"),
]  # fmt: skip


@given(data=st.data())
def test_any_pair_of_views_of_one_buffer(data):
    """Provable overlap is refused, disjoint views and exact aliases are merged."""
    shape = data.draw(st.tuples(*[st.integers(1, 4)] * 3), "shape")
    dtype = data.draw(st.sampled_from([F32, F16, F64]), "dtype")
    call = make_call(shape, dtype, empty=False)
    largest = data.draw(st.sampled_from([12, 200, 3000]), "largest stride")
    memory = torch.zeros((9 * largest + 50) * 8, dtype=torch.uint8)
    views = {}
    names = data.draw(st.sampled_from(PAIRS), "pair")
    same = data.draw(st.integers(0, 3), "same") == 0
    for name in names:
        tensor = getattr(call, name)
        typed = memory.view(tensor.dtype)
        strides = tuple(data.draw(st.integers(0, largest), f"{name} stride") for _ in tensor.shape)
        offset = data.draw(st.integers(0, 40), f"{name} offset")
        view = typed.as_strided(tensor.shape, strides, offset)
        if same and views and next(iter(views.values())).shape == view.shape:
            view = next(iter(views.values()))
        views[name] = view
    call = call._replace(**views)
    memory.view(F16).copy_(
        1 + torch.rand(len(memory) // 2)
    )  # ordinary numbers in every wider dtype too
    if name := refused_operand(call):
        before = memory.clone()
        with pytest.raises(ValueError, match=rf"^{name}: expected "):
            merge(*call)
        assert torch.equal(memory, before)
    else:
        check(call)
