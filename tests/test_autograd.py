"""What autograd is owed by an operator that writes and has no gradient, through every way in.

It refuses an operand whose gradient would be lost, and lets autograd see what it overwrites.
"""

import pytest
import torch
from support import LSES, ROWS, Call, Recording, assert_bits, cloned, make_call, refusal_of
from torch.autograd import forward_ad

from merge_attn_states import merge_attn_states as merge

N, H, D = 4, 2, 8
OPERANDS = (*ROWS, *LSES)
OVERWRITTEN = "modified by an inplace operation"  # PyTorch's own words


def small(**options) -> Call:
    return make_call((N, H, D), device=options.pop("device", "cpu"), empty=False, **options)


def operands(call: Call, **changes) -> tuple[torch.Tensor, ...]:
    return call._replace(**changes)[:6]


def saves(tensor: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """A weight and a loss whose backward needs the tensor."""
    weight = torch.ones_like(tensor, requires_grad=True)
    return weight, (weight * tensor).sum()


# An overwrite.


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
@pytest.mark.parametrize("name", ["output", "output_lse"])
def test_an_overwrite_is_seen(name, context, device, way):
    call = small(device=device)
    _, loss = saves(getattr(call, name).zero_())
    with context():
        way.run(lambda *args: way.merge(*args))(*operands(call))
    assert not getattr(call, name).isnan().any()
    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        loss.backward()


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_an_overwrite_in_the_same_graph_is_seen(context, way):
    call = small()
    weight = torch.ones_like(call.output, requires_grad=True)

    def step(weight, *args):
        loss = (weight * args[0]).sum()
        with context():
            way.merge(*args)
        return loss

    with pytest.raises(RuntimeError, match=OVERWRITTEN):
        way.run(step)(weight, *operands(call)).backward()


@pytest.mark.parametrize("way", [f"python, {b}" for b in ("aot_eager", "inductor")], indirect=True)
def test_compiled_layers_share_an_output(way):
    """Each layer's graph saves what it merged itself, and the next one overwrites the output."""
    calls = [small(seed=seed) for seed in range(2)]
    expected = [cloned(call) for call in calls]
    for call in expected:
        merge(*call)
    shared, shared_lse = calls[0].output, calls[0].output_lse

    def layer(weight, *args):
        way.merge(*args)
        return (weight * args[0]).sum() + (weight[0, 0, 0] * args[5]).sum()

    run = way.run(layer)
    weights = [torch.ones((N, H, D), requires_grad=True) for _ in calls]
    losses = [
        run(weight, *operands(call, output=shared, output_lse=shared_lse))
        for weight, call in zip(weights, calls, strict=True)
    ]
    sum(losses).backward()
    for weight, call in zip(weights, expected, strict=True):
        gradient = call.output.clone()
        gradient[0, 0, 0] += call.output_lse.sum()
        torch.testing.assert_close(weight.grad, gradient)
    assert_bits(shared, expected[1].output)
    assert_bits(shared_lse, expected[1].output_lse)


def sees_each_layer(way, write, calls):
    """Whether compiled layers that share a buffer have the gradients of what `write` wrote for each
    into the buffer's first tokens.
    """
    buffer = torch.zeros(2 * N, H, D)

    def layer(weight, *args):
        output = buffer[:N]
        write(output, *args)
        return (weight * output).sum()

    run = way.run(layer)
    weights = [torch.ones((N, H, D), requires_grad=True) for _ in calls]
    sum(run(weight, *call[1:5]) for weight, call in zip(weights, calls, strict=True)).backward()
    written = [torch.empty(N, H, D) for _ in calls]
    for output, call in zip(written, calls, strict=True):
        write(output, *call[1:5])
    pairs = zip(weights, written, strict=True)
    return all(torch.allclose(weight.grad, output) for weight, output in pairs)


@pytest.mark.parametrize("way", [f"python, {b}" for b in ("aot_eager", "inductor")], indirect=True)
def test_a_view_of_the_output_that_the_graph_makes_is_pytorchs(way):
    """README's limits: Inductor saves the memory that the next layer overwrites. Where PyTorch's
    own copy is right, so is the merge.
    """
    calls = [small(seed=seed) for seed in range(2)]
    copies = sees_each_layer(way, lambda output, prefix, *_: output.copy_(2 * prefix), calls)
    assert sees_each_layer(way, way.merge, calls) == copies
    assert copies or way.backend == "inductor"


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad])
def test_versions_rise_once_a_call(context, device, entry):
    call = small(device=device)
    before = [tensor._version for tensor in operands(call)]
    with context():
        entry(*call)
    raised = [x._version - old for x, old in zip(operands(call), before, strict=True)]
    assert raised == [1, 0, 0, 0, 0, 1]


def test_a_refused_call_raises_no_version(device, entry):
    call = small(device=device)
    before = [tensor._version for tensor in operands(call)]
    with pytest.raises(refusal_of(entry), match=r"^suffix_lse: expected shape"):
        entry(*call._replace(suffix_lse=call.suffix_lse.T))
    assert [tensor._version for tensor in operands(call)] == before


# An operand that requires grad.


@pytest.mark.parametrize("name", OPERANDS)
def test_what_requires_grad_is_refused(name, device, way):
    call = small(device=device)
    getattr(call, name).requires_grad_()
    with pytest.raises(way.refusal, match=rf"{name}: expected a tensor that does not require grad"):
        way.run(lambda *args: way.merge(*args))(*operands(call))
    assert call.output.isnan().all()
    assert call.output_lse.isnan().all()


def test_what_was_computed_from_it_is_refused(device, way):
    call = small(device=device)
    computed = call.prefix_output.requires_grad_() * 1
    with pytest.raises(way.refusal, match="prefix_output: expected a tensor that does not require"):
        way.run(lambda *args: way.merge(*args))(*operands(call, prefix_output=computed))
    assert call.output.isnan().all()


def test_without_grad_mode_a_leaf_is_an_operand_like_any(device, way):
    call = small(device=device)
    expected = cloned(call)
    merge(*expected)
    for tensor in operands(call):
        tensor.requires_grad_()
    with torch.no_grad():
        way.run(lambda *args: way.merge(*args))(*operands(call))
    assert_bits(call.output, expected.output)
    assert_bits(call.output_lse, expected.output_lse)


# Forward mode and torch.func.

TANGENT = "prefix_output: expected a tensor without a forward-mode tangent"


def test_a_dual_is_refused(entry):
    call = small()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call.prefix_output, call.prefix_output)
        for context in (torch.enable_grad, torch.no_grad):
            with context(), pytest.raises(ValueError, match=f"^{TANGENT}"):
                entry(*call._replace(prefix_output=dual))
    assert call.output.isnan().all()


@pytest.mark.parametrize("way", ["python, eager", "torch.ops, aot_eager"], indirect=True)
def test_a_dual_is_refused_when_compiled(way):
    """By the operator where PyTorch compiles duals at all."""
    call = small()
    with forward_ad.dual_level():
        dual = forward_ad.make_dual(call.prefix_output, call.prefix_output)
        with pytest.raises(Exception, match=r"tangent|dual|forward"):
            way.run(lambda *args: way.merge(*args))(*operands(call, prefix_output=dual))
    assert call.output.isnan().all()


def test_a_plain_operand_beside_a_dual_level(entry):
    call, expected = small(), small()
    merge(*expected)
    with forward_ad.dual_level():
        entry(*call)
    assert_bits(call.output, expected.output)


def by_grad(f, x):
    return torch.func.grad(lambda x: f(x).sum())(x)


def by_vjp(f, x):
    return torch.func.vjp(f, x)[1](torch.ones_like(x))[0]


def by_jvp(f, x):
    return torch.func.jvp(f, (x,), (torch.ones_like(x),))[1]


TRANSFORMS = {by_grad: "does not require grad", by_vjp: "does not require grad", by_jvp: "tangent"}


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_a_transform_of_an_operand_is_refused(transform, entry):
    call = small()

    def merged(x):
        entry(*call._replace(prefix_output=x))
        return x

    with pytest.raises(ValueError, match=rf"^prefix_output: .*{TRANSFORMS[transform]}"):
        transform(merged, call.prefix_output)
    assert call.output.isnan().all()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=lambda f: f.__name__)
def test_plain_operands_inside_a_transform(transform, entry):
    call, expected = small(), small()
    merge(*expected)

    def scaled(x):
        entry(*call)
        return call.output * x

    derivative = transform(scaled, torch.ones((N, H, D)))
    torch.testing.assert_close(derivative, expected.output, rtol=0, atol=0)


# Inference mode.


def test_inference_mode_asks_autograd_nothing(entry, monkeypatch):
    def unexpected(*_):
        raise AssertionError

    monkeypatch.setattr(torch._C, "_increment_version", unexpected)
    with torch.inference_mode():
        call = small()
        entry(*call)
    assert not call.output.isnan().any()


def test_an_inference_tensor_outside_of_inference_mode(entry):
    with torch.inference_mode():
        call = small()
    expected = small()
    merge(*expected)
    entry(*call)
    assert_bits(call.output, expected.output)


def test_a_mode_below_autograd_sees_the_op_once(way):
    call = small()
    with Recording() as mode:
        way.merge(*call)
    assert [str(op) for op in mode.seen] == ["merge_attn_states.merge_attn_states.default"]
