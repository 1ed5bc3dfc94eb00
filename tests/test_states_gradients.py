"""The gradients of merge_states: gradcheck over every option, and the reference's own."""

import itertools

import pytest
import torch
from states_support import States, make_states
from support import BF16, E4M3, F16, F32, F64, INF, assert_bits

from merge_attn_states import merge_states, update_state
from merge_attn_states.reference import merge_states_reference

OPTIONS = {
    "plain": {},
    "base 2": {"base": "2"},
    "base 2 to e": {"base": "2", "out_lse_base": "e"},
    "mixed bases": {"base": ["e", "2", "e"], "out_lse_base": "2"},
    "sink": {"sink": True},
    "sink of another base": {"sink": True, "out_lse_base": "2"},
    "masks": {"empty": True},
    "index": {"index": True},
    "all of them": {
        "base": ["2", "e", "2"],
        "out_lse_base": "e",
        "sink": True,
        "empty": True,
        "index": True,
    },
}
ROWS, HEADS, SIZE, COUNT, TOKENS = 4, 3, 5, 3, 6


def states_with(options, dtype=F64, device="cpu") -> States:
    """Rows of all kinds: all parts empty, one alone, absent by index; finite values everywhere."""
    options = dict(options)
    wants = {name: options.pop(name, False) for name in ("sink", "empty", "index")}
    states = make_states((ROWS, HEADS), SIZE, COUNT, dtype, device, **options)
    outputs = [x.nan_to_num(0.5) for x in states.outputs]
    sink = torch.tensor([0.5, -INF, 2.0], dtype=dtype, device=device) if wants["sink"] else None
    masks = None
    if wants["empty"]:
        masks = [torch.zeros(ROWS, HEADS, dtype=torch.bool, device=device) for _ in range(COUNT)]
        masks[0][2] = True
        masks[2][3, 1] = True
        masks[1] = None
    index = None
    if wants["index"]:
        generator = torch.Generator().manual_seed(3)
        index = [
            torch.randint(-1, ROWS, (TOKENS,), generator=generator).to(device) for _ in range(COUNT)
        ]
        index[0][0] = index[1][0] = index[2][0] = -1  # nobody
    return states._replace(outputs=outputs, sink=sink, empty=masks, index=index)


def wanting(tensor):
    return tensor.detach().clone().requires_grad_()


def function_of(states, function):
    """The merge as a function of outputs, LSEs and sink, -inf kept out of finite differences."""
    count = len(states.outputs)

    def merge(*operands):
        outputs, lses = operands[:count], operands[count : 2 * count]
        sink = operands[2 * count] if states.sink is not None else None
        out, lse = function(
            list(outputs),
            list(lses),
            index=states.index,
            empty=states.empty,
            sink=sink,
            lse_base=states.lse_base,
            out_lse_base=states.out_lse_base,
        )
        return out, lse.masked_fill(lse.isinf(), 0.0)

    operands = [*states.outputs, *states.lses, *([states.sink] if states.sink is not None else [])]
    return merge, [wanting(x) for x in operands]


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_gradcheck(options, device):
    merge, operands = function_of(states_with(options, device=device), merge_states)
    # Infinite LSEs have no difference quotient: they are checked beside the reference.
    finite = [x.isfinite() for x in operands]
    base = [x.detach().masked_fill(~f, 0.0) for x, f in zip(operands, finite, strict=True)]

    def of_finite(*values):
        return merge(
            *(torch.where(f, v, x) for f, v, x in zip(finite, values, operands, strict=True))
        )

    operands = [x.detach() for x in operands]
    assert torch.autograd.gradcheck(of_finite, [wanting(x) for x in base], fast_mode=False)


@pytest.mark.parametrize("dtype", [F64, F32, BF16, F16])
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_beside_autograd_through_the_reference(options, dtype, device):
    states = states_with(options, dtype, device)
    merge, operands = function_of(states, merge_states)
    plain, exact = function_of(states, merge_states_reference)
    out, lse = merge(*operands)
    expected, expected_lse = plain(*exact)
    grad_out = torch.randn(out.shape, dtype=F64, device=device).to(dtype)
    grad_lse = torch.randn(lse.shape, dtype=F64, device=device).to(lse.dtype)
    grads = torch.autograd.grad([out, lse], operands, [grad_out, grad_lse])
    wanted = torch.autograd.grad(
        [expected, expected_lse], exact, [grad_out.to(F64), grad_lse.to(F64)]
    )
    coarse = {F64: 1e-12, F32: 2e-6, BF16: 2e-2, F16: 2e-3}[dtype]
    for grad, want, operand in zip(grads, wanted, operands, strict=True):
        assert grad.shape == operand.shape
        assert grad.dtype == operand.dtype
        fine = coarse if operand.dtype == dtype else 2e-6
        if states.index is not None and operand.dtype == dtype:
            fine = 4 * coarse  # rows that several took are rounded at each addition
        torch.testing.assert_close(grad.to(F64), want.to(F64), rtol=fine, atol=20 * fine)


@pytest.mark.parametrize("dim", [0, 1, 2])
@pytest.mark.parametrize("indexed", [False, True])
def test_a_stack_has_the_gradients_of_its_parts(dim, indexed, device):
    states = states_with({"empty": True, "index": indexed, "sink": True}, F32, device)
    merge, operands = function_of(states, merge_states)
    grad = torch.randn((TOKENS if indexed else ROWS, HEADS, SIZE), device=device)
    listed = torch.autograd.grad(merge(*operands)[0], operands, grad)
    outputs, lses = (wanting(torch.stack(x, dim)) for x in (states.outputs, states.lses))
    out, _ = merge_states(
        outputs, lses, dim=dim, index=states.index, empty=states.empty, sink=states.sink
    )
    of_outputs, of_lses = torch.autograd.grad(out, [outputs, lses], grad)
    assert_bits(of_outputs, torch.stack(listed[:COUNT], dim))
    assert_bits(of_lses, torch.stack(listed[COUNT : 2 * COUNT], dim))


@pytest.mark.parametrize("of", ["dense", "padded", "permuted", "lse of one column"])
@pytest.mark.parametrize("dim", [0, 1, 2])
def test_a_leaf_keeps_the_gradient_of_a_stack_as_it_lies_itself(dim, of, device):
    """Autograd keeps one that lies as the leaf does, copies another, and adds the next one to it.

    The operator's are contiguous along the parts, and `dim` is where the stack has them.
    """
    states = make_states((4, 3), 8, COUNT, F32, device, empty=False)
    outputs, lses = torch.stack(states.outputs, dim), torch.stack(states.lses, dim)
    if of == "padded":
        outputs, lses = torch.cat([outputs] * 2, -1)[..., :8], torch.cat([lses] * 2, -1)
        lses = lses[..., : lses.shape[-1] // 2]
    elif of == "permuted":
        outputs, lses = (x.transpose(0, 2).contiguous().transpose(0, 2) for x in (outputs, lses))
    elif of == "lse of one column":
        lses = lses.unsqueeze(-1)
    operands = [x.detach().requires_grad_() for x in (outputs, lses)]
    out, lse = merge_states(*operands, dim=dim)
    loss = (out * torch.randn_like(out)).sum() + lse.sum()
    grads = torch.autograd.grad(loss, operands, retain_graph=True)
    loss.backward(retain_graph=True)
    for operand, grad in zip(operands, grads, strict=True):
        assert_bits(operand.grad, grad)
        assert of == "padded" or operand.grad.stride() == operand.stride()
    loss.backward()
    for operand, grad in zip(operands, grads, strict=True):
        assert_bits(operand.grad, 2 * grad)
        operand.grad.zero_()
        assert (operand.grad == 0).all()


def test_an_empty_part_has_no_gradient_and_is_not_read(device):
    states = make_states((4, 3), 8, 3, F32, device)  # NaN where a part is empty
    outputs, lses = [wanting(x) for x in states.outputs], [wanting(x) for x in states.lses]
    out, lse = merge_states(outputs, lses)
    (out.sum() + lse[lse.isfinite()].sum()).backward()
    for output, lse in zip(outputs, lses, strict=True):
        gone = lse.isinf()
        assert (output.grad[gone] == 0).all()
        assert (lse.grad[gone] == 0).all()
        assert output.grad.isfinite().all()
        assert lse.grad.isfinite().all()


@pytest.mark.parametrize("shape", [(0, 3, 8), (4, 0, 8), (4, 3, 0)])
def test_a_merge_without_elements_has_gradients(shape, device):
    outputs = [wanting(torch.zeros(shape, device=device)) for _ in range(COUNT)]
    lses = [wanting(torch.zeros(shape[:-1], device=device)) for _ in range(COUNT)]
    out, lse = merge_states(outputs, lses)
    (out.sum() + lse.sum()).backward()
    assert all(x.grad.shape == x.shape for x in outputs + lses)
    for x in lses:
        torch.testing.assert_close(x.grad, torch.full_like(x, 1 / COUNT))


@pytest.mark.parametrize("count", [2, 3])
def test_an_empty_part_beside_a_nan_has_no_gradient(count, device):
    outputs = [wanting(torch.ones(1, 1, 4, device=device)) for _ in range(count)]
    lses = [wanting(torch.zeros(1, 1, device=device)) for _ in range(count)]
    with torch.no_grad():
        lses[0].fill_(float("nan"))
        lses[1].fill_(-INF)
        outputs[1].fill_(float("nan"))
    merge_states(outputs, lses)[0].sum().backward()
    assert (outputs[1].grad == 0).all()
    assert (lses[1].grad == 0).all()
    assert outputs[0].grad.isnan().all()
    assert lses[0].grad.isnan().all()


def test_mixed_dtypes_have_gradients_of_their_own(device):
    states = make_states((4, 3), 8, 3, [F32, BF16, F16], device, empty=False)
    outputs = [wanting(x) for x in states.outputs]
    out, _ = merge_states(outputs, states.lses)
    grads = torch.autograd.grad(out, outputs, torch.ones_like(out))
    assert [grad.dtype for grad in grads] == [F32, BF16, F16]
    exact = [wanting(x.to(F64)) for x in outputs]
    expected, _ = merge_states_reference(exact, states.lses)
    for grad, want in zip(grads, torch.autograd.grad(expected.sum(), exact), strict=True):
        torch.testing.assert_close(grad.to(F64), want, rtol=1e-2, atol=1e-3)


def test_the_gradient_may_lie_anywhere(device):
    states = make_states((4, 3), 8, 3, F32, device, empty=False)
    outputs = [wanting(x) for x in states.outputs]
    out, _ = merge_states(outputs, states.lses)
    dense = torch.randn(out.shape, device=device)
    strided = dense.permute(2, 0, 1).contiguous().permute(1, 2, 0)
    for a, b in zip(
        torch.autograd.grad(out, outputs, dense, retain_graph=True),
        torch.autograd.grad(out, outputs, strided, retain_graph=True),
        strict=True,
    ):
        assert_bits(a, b)
    out.sum().backward()  # strides of 0
    weights = [output.grad for output in outputs]
    torch.testing.assert_close(sum(weights), torch.ones_like(out))


@pytest.mark.parametrize("wanted", list(itertools.product([False, True], repeat=3))[1:])
def test_only_what_is_wanted(wanted, device):
    states = states_with({"sink": True}, F64, device)
    outputs = [x.requires_grad_(wanted[0]) for x in states.outputs]
    lses = [x.requires_grad_(wanted[1]) for x in states.lses]
    sink = states.sink.requires_grad_(wanted[2])
    out, _ = merge_states(outputs, lses, sink=sink)
    out.sum().backward()
    for operands, is_wanted in ((outputs, wanted[0]), (lses, wanted[1]), ([sink], wanted[2])):
        assert all((x.grad is not None) == is_wanted for x in operands)


def test_an_lse_that_nobody_asked_for(device):
    states = states_with({}, F64, device)
    outputs = [wanting(x) for x in states.outputs]
    out, none = merge_states(outputs, states.lses, return_lse=False)
    assert none is None
    out.sum().backward()
    lses = [wanting(x) for x in states.lses]
    _, lse = merge_states(states.outputs, lses)
    lse[lse.isfinite()].sum().backward()  # the output is not used
    total = sum(x.grad for x in lses)
    torch.testing.assert_close(total[lse.isfinite()], torch.ones_like(total[lse.isfinite()]))


def test_what_has_no_gradient_is_refused(device):
    states = make_states((4, 3), 8, 3, F32, device, empty=False)
    outputs = [wanting(x) for x in states.outputs]
    out, _ = merge_states(outputs, states.lses)
    with pytest.raises(ValueError, match="merge_states has no second derivative"):
        torch.autograd.grad(out.sum(), outputs, create_graph=True)
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected .* does not require grad"):
        merge_states(outputs, states.lses, out=torch.empty_like(out))
    with pytest.raises(ValueError, match="block_out: expected a tensor that does not require grad"):
        update_state(torch.empty_like(out), states.lses[0], outputs[0], states.lses[1])
    narrow = make_states((4, 3), 8, 2, E4M3, device, empty=False)
    lses = [wanting(x) for x in narrow.lses]
    with pytest.raises(ValueError, match=r"outputs\[0\]: expected a dtype that has gradients"):
        merge_states(narrow.outputs, lses)
    with pytest.raises(ValueError, match="out: expected a dtype that has gradients"):
        merge_states(outputs, states.lses, out_dtype=E4M3, out_scale=torch.ones((), device=device))


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
def test_compiled(backend, dim, device):
    states = states_with({"empty": True, "sink": True}, F32, device)

    def step(outputs, lses, sink):
        if dim is not None:
            outputs, lses = torch.stack(outputs, dim), torch.stack(lses, dim)
        out, lse = merge_states(outputs, lses, dim=dim, sink=sink, empty=states.empty)
        return out.square().sum() + lse.masked_fill(lse.isinf(), 0.0).sum()

    torch._dynamo.reset()
    compiled = torch.compile(step, backend=backend, fullgraph=True, dynamic=True)
    grads = []
    for function in (step, compiled):
        outputs, lses = [wanting(x) for x in states.outputs], [wanting(x) for x in states.lses]
        sink = wanting(states.sink)
        function(outputs, lses, sink).backward()
        grads.append([x.grad for x in (*outputs, *lses, sink)])
    for eager, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, eager)


def attend_plainly(query, key, value):
    scores = query @ key.transpose(-1, -2) / query.shape[-1] ** 0.5
    return scores.softmax(-1) @ value, scores.logsumexp(-1)


def attend_flexibly(query, key, value):
    from torch.nn.attention.flex_attention import AuxRequest, flex_attention

    out, aux = flex_attention(query, key, value, return_aux=AuxRequest(lse=True))
    return out, aux.lse


def test_two_calls_of_attention_train_as_one(device):
    """A merge of two parts of the keys beside one call over all of them: flex_attention on a GPU.

    (It has no backward on a CPU.)
    """
    attend = attend_flexibly if device == "cuda" else attend_plainly
    query, key, value = (torch.randn(1, 2, n, 16, device=device) for n in (7, 24, 24))
    want = torch.randn(1, 2, 7, 16, device=device)
    grads = []
    for split in (False, True):
        q, k, v = wanting(query), wanting(key), wanting(value)
        if split:
            parts = [attend(q, k[:, :, a:b], v[:, :, a:b]) for a, b in ((0, 9), (9, 24))]
            out, lse = merge_states([o for o, _ in parts], [x for _, x in parts])
        else:
            out, lse = attend(q, k, v)
        ((out * want).sum() + lse.square().sum()).backward()
        grads.append([q.grad, k.grad, v.grad])
    for one, two in zip(*grads, strict=True):
        torch.testing.assert_close(two, one, rtol=1e-4, atol=1e-5)
