"""What autograd is owed by the forms of many parts that write in place, through every way in.

They refuse an operand whose gradient would be lost, and let autograd see what they overwrite.
"""

import re

import pytest
import torch
from states_support import States, make_states
from support import F32, assert_bits, blank
from torch.autograd import forward_ad

from merge_attn_states import merge_states, update_state

OPS = torch.ops.merge_attn_states
N, H, D, K = 4, 2, 8, 3
OVERWRITTEN = "modified by an inplace operation"  # PyTorch's own words
BACKENDS = ("eager", "aot_eager", "inductor")
UPDATE = ("out", "lse", "block_out", "block_lse")


def parts(device="cpu", seed=0) -> States:
    states = make_states((N, H), D, K, F32, device, empty=False, seed=seed)
    return states._replace(
        out=blank((N, H, D), F32, device),
        out_lse=blank((N, H), F32, device),
        sink=torch.zeros(H, device=device),
    )


# Each way that writes takes its operands one after the other.


def merge(*operands) -> None:
    out, out_lse, sink, *listed = operands
    merge_states(listed[:K], listed[K:], sink=sink, out=out, out_lse=out_lse)


def merge_by_op(*operands) -> None:
    out, out_lse, sink, *listed = operands
    OPS.merge_states_out(out, out_lse, listed[:K], listed[K:], [], [], None, sink)


def update(*operands) -> None:
    update_state(*operands)


def update_by_op(*operands) -> None:
    OPS.update_state(*operands)


MERGES = {
    "out": 0, "out_lse": 1, "sink": 2, **{f"outputs[{k}]": 3 + k for k in range(K)},
    **{f"lses[{k}]": 3 + K + k for k in range(K)},
}  # fmt: skip
UPDATES = {name: i for i, name in enumerate(UPDATE)}
FORMS = [(merge, MERGES), (merge_by_op, MERGES), (update, UPDATES), (update_by_op, UPDATES)]
EACH = [(form, names, name) for form, names in FORMS for name in names]


def operands_of(names, device="cpu", seed=0) -> list[torch.Tensor]:
    states = parts(device, seed)
    if names is UPDATES:
        return [states.outputs[0], states.lses[0], states.outputs[1], states.lses[1]]
    return [states.out, states.out_lse, states.sink, *states.outputs, *states.lses]


def through(form, backend):
    """The form as it is, or in one graph that nothing compiled before stands in for."""
    if backend is None:
        return form
    torch._dynamo.reset()
    return torch.compile(form, backend=backend, fullgraph=True)


WAYS = [None, *BACKENDS]
without_caches = torch._inductor.config.patch(force_disable_caches=True)


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(("form", "names", "name"), EACH, ids=lambda x: getattr(x, "__name__", x))
@without_caches
def test_what_requires_grad_is_refused(form, names, name, backend):
    operands = operands_of(names)
    operands[names[name]].requires_grad_()
    before = [x.detach().clone() for x in operands]
    sentence = f"{name}: expected a tensor that does not require grad"
    kind = RuntimeError if backend else ValueError
    with pytest.raises(kind, match=("" if backend else "^") + re.escape(sentence)):
        through(form, backend)(*operands)
    for now, old in zip(operands, before, strict=True):
        assert_bits(now, old)


@pytest.mark.parametrize("name", ["outputs[0]", "lses[0]"])
def test_a_stack_that_requires_grad_is_refused(name, device):
    states = parts(device)
    stack = {"outputs": torch.stack(states.outputs), "lses": torch.stack(states.lses)}
    stack[name[:-3]].requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name[:-3]}(\[0\])?: expected a tensor that does not"):
        states._replace(**stack, dim=0).run()
    assert states.out.isnan().all()


@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(("form", "names"), FORMS, ids=lambda x: getattr(x, "__name__", ""))
@without_caches
def test_without_grad_mode_a_leaf_is_an_operand_like_any(form, names, backend):
    operands, expected = operands_of(names), operands_of(names)
    form(*expected)
    for tensor in operands:
        tensor.requires_grad_()
    with torch.no_grad():
        through(form, backend)(*operands)
    for now, due in zip(operands, expected, strict=True):
        assert_bits(now, due)


# An overwrite.


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("which", [0, 1])
@pytest.mark.parametrize("backend", WAYS)
@pytest.mark.parametrize(("form", "names"), FORMS, ids=lambda x: getattr(x, "__name__", ""))
@without_caches
def test_an_overwrite_is_seen(form, names, backend, which, context):
    operands = operands_of(names)
    written = operands[which].zero_()
    weight = torch.ones_like(written, requires_grad=True)
    loss = (weight * written).sum()
    with context():
        through(form, backend)(*operands)
    assert (written != 0).any()
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        loss.backward()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(("form", "names"), FORMS, ids=lambda x: getattr(x, "__name__", ""))
def test_versions_rise_once_a_call(form, names, context, device):
    operands = operands_of(names, device)
    before = [x._version for x in operands]
    with context():
        form(*operands)
    raised = [x._version - old for x, old in zip(operands, before, strict=True)]
    assert raised == [1, 1] + [0] * (len(operands) - 2)


def test_of_what_is_written_in_place_the_part_is_raised(device):
    states = parts(device)
    operands = (*states.outputs, *states.lses)
    before = [x._version for x in operands]
    states._replace(out=states.outputs[1], out_lse=None).run()
    states._replace(out=None, out_lse=states.lses[2]).run()
    states._replace(out=None, out_lse=None).run()
    raised = [
        x._version - old for x, old in zip((*states.outputs, *states.lses), before, strict=True)
    ]
    assert raised == [0, 1, 0, 0, 0, 1]


def test_a_refused_call_raises_no_version(device):
    states = parts(device)
    states.lses[1] = states.lses[1].T
    before = [x._version for x in (states.out, states.out_lse)]
    with pytest.raises(ValueError, match=r"^lses\[1\]: expected shape"):
        states.run()
    assert [x._version for x in (states.out, states.out_lse)] == before


def test_inference_mode_asks_autograd_nothing(monkeypatch):
    def unexpected(*_):
        raise AssertionError

    monkeypatch.setattr(torch._C, "_increment_version", unexpected)
    with torch.inference_mode():
        for form, names in FORMS:
            form(*operands_of(names))


@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
@pytest.mark.parametrize(("form", "names"), FORMS[::2], ids=["merge", "update"])
@without_caches
def test_compiled_layers_share_an_output(form, names, backend):
    """Each layer's graph saves what it merged itself, and the next one overwrites the output."""

    def layer(weight, *operands):
        form(*operands)
        return (weight * operands[0]).sum() + (weight[0, 0, 0] * operands[1]).sum()

    run = through(layer, backend)
    out, out_lse, *_ = operands_of(names)
    shared = out.clone(), out_lse.clone()
    weights = [torch.ones((N, H, D), requires_grad=True) for _ in range(2)]
    losses, merged = [], []
    for seed, weight in enumerate(weights):
        others = operands_of(names, seed=seed)[2:]
        losses.append(run(weight, *shared, *others))
        form(out, out_lse, *others)
        merged.append((out.clone(), out_lse.clone()))
        assert_bits(shared[0], out)
        assert_bits(shared[1], out_lse)
    sum(losses).backward()
    for weight, (output, lse) in zip(weights, merged, strict=True):
        output[0, 0, 0] += lse.sum()
        torch.testing.assert_close(weight.grad, output)


# Forward mode and torch.func.


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize(("form", "names", "name"), EACH, ids=lambda x: getattr(x, "__name__", x))
def test_a_dual_is_refused(form, names, name, context):
    operands = operands_of(names)
    before = [x.clone() for x in operands]
    with forward_ad.dual_level():
        at = names[name]
        dual = forward_ad.make_dual(operands[at], torch.ones_like(operands[at]))
        given = [dual if i == at else x for i, x in enumerate(operands)]
        sentence = f"{name}: expected a tensor without a forward-mode tangent"
        with context(), pytest.raises(ValueError, match=f"^{re.escape(sentence)}"):
            form(*given)
    for now, old in zip(operands, before, strict=True):
        assert_bits(now, old)


@pytest.mark.parametrize("transform", [
    lambda f, x: torch.func.grad(lambda y: f(y).sum())(x),
    lambda f, x: torch.func.vjp(f, x)[1](torch.ones_like(x))[0],
    lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),))[1],
], ids=["grad", "vjp", "jvp"])  # fmt: skip
@pytest.mark.parametrize(("form", "names"), FORMS, ids=lambda x: getattr(x, "__name__", ""))
def test_a_transform_of_an_operand_is_refused(form, names, transform):
    operands = operands_of(names)
    at, name = (3, "outputs[0]") if names is MERGES else (2, "block_out")

    def merged(x):
        form(*operands[:at], x, *operands[at + 1 :])
        return x

    with pytest.raises(ValueError, match=rf"^{re.escape(name)}: .*(require grad|tangent)"):
        transform(merged, operands[at])


@pytest.mark.parametrize(("form", "names"), FORMS, ids=lambda x: getattr(x, "__name__", ""))
def test_vmap_is_refused(form, names):
    """No batching rule is written: nothing may be merged along the wrong dimension in silence."""
    batched = [torch.stack([x] * 2) for x in operands_of(names)]
    before = batched[0].clone()
    with pytest.raises(RuntimeError, match=r"^Batching rule not implemented for merge_attn_states"):
        torch.vmap(lambda *operands: form(*operands))(*batched)
    assert_bits(batched[0], before)


def test_vmap_sees_a_tensor_that_stands_alone_in_a_list():
    """PyTorch has to see every operand, in whatever list it stands."""
    states = parts()
    masks = torch.rand(2, N, H) < 0.5

    def merged(**options):
        return merge_states(states.outputs, states.lses, **options)[0]

    both = torch.vmap(lambda mask: merged(empty=[None, mask, None]))(masks)
    for one, mask in zip(both, masks, strict=True):
        assert_bits(one, merged(empty=[None, mask, None]))
    rows = torch.stack([torch.arange(N)] * 2)
    with pytest.raises(ValueError, match=r"^index: expected none under torch\.vmap"):
        torch.vmap(lambda index: merged(index=[None, index, None]))(rows)
