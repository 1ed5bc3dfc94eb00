"""attention_with_lse where something stands between the caller and the kernels."""

import pytest
import torch
from attention_support import additive, check, operands
from support import BF16, F16, F32, F64, NAN, assert_bits
from torch._dynamo.testing import CompileCounterWithBackend
from torch.fx.experimental.proxy_tensor import make_fx

from merge_attn_states.integrations import pytorch
from merge_attn_states.integrations.pytorch import attention_with_lse

OPERATOR = torch.ops.merge_attn_states.attention_with_lse.default


@pytest.fixture(autouse=True)
def no_stale_graph():
    torch._dynamo.reset()
    with torch._inductor.utils.fresh_cache():
        yield


def masked(queries, keys, device, dtype=F32, value_head_size=16):
    """Operands and a mask, with a row without keys, a hidden NaN and one that is seen."""
    query, key, value = operands((2, 4, 2, queries, keys, 16, value_head_size), dtype, device)
    mask = torch.rand(2, 1, queries, keys, device=device) < 0.7
    mask[0, 0, 1] = False
    mask[:, :, :, 2] = False
    mask[1, 0, 0, 3] = True
    key[:, :, 2], value[1, 1, 3, 0] = NAN, NAN
    return query, key, value, mask


def assert_same(state, expected):
    for actual, due in zip(state, expected, strict=True):
        assert_bits(actual, due)
        assert actual.stride() == due.stride()


class Attention(torch.nn.Module):
    def __init__(self, is_causal):
        super().__init__()
        self.is_causal = is_causal

    def forward(self, query, key, value, mask=None):
        output, lse = attention_with_lse(query, key, value, mask, is_causal=self.is_causal)
        return output * 2, lse  # something for the compiler to do


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("with_mask", [False, True])
@pytest.mark.parametrize("backend", ["aot_eager", "inductor"])
def test_compiled_in_one_graph(backend, with_mask, is_causal, device):
    layer = Attention(is_causal)
    counter = CompileCounterWithBackend(backend)
    run = torch.compile(layer, fullgraph=True, dynamic=True, backend=counter)
    for queries, keys in ((5, 7), (6, 9)):  # a second size without a second graph
        inputs = masked(queries, keys, device, BF16)
        inputs = inputs if with_mask else inputs[:3]
        assert_same(run(*inputs), layer(*inputs))
    assert counter.frame_count == 1


@pytest.mark.parametrize("strict", [False, True])
def test_exported(strict, device):
    layer, tokens = Attention(is_causal=True), torch.export.Dim("tokens", min=2, max=4096)
    sizes = ({2: tokens}, None, None, {2: tokens})
    program = torch.export.export(
        layer, masked(5, 7, device), dynamic_shapes=sizes, strict=strict
    ).module()
    for queries in (5, 31):
        inputs = masked(queries, 7, device)
        assert_same(program(*inputs), layer(*inputs))


def test_traced(device):
    inputs = masked(5, 7, device)
    graph = make_fx(lambda *given: attention_with_lse(*given))(*inputs)
    assert [node.target for node in graph.graph.nodes].count(OPERATOR) == 1
    other = masked(5, 7, device)
    assert_same(graph(*other), attention_with_lse(*other))


CALLS = {  # queries, keys, value head size, is_causal, with a mask
    "square": (6, 6, 16, True, False),
    "queries before the first key": (9, 6, 16, True, False),
    "a mask": (5, 7, 16, True, True),
    "V narrower than Q": (5, 7, 8, False, True),
    "V wider than Q": (5, 7, 24, False, False),
    "no keys": (5, 0, 16, False, False),
    "no queries": (0, 5, 16, True, False),
}


@pytest.mark.parametrize("stored_by_token", [False, True])
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("name", CALLS)
def test_the_operator_is_as_it_says(name, dtype, stored_by_token, device):
    """Its fake has the shapes and strides of the real one."""
    queries, keys, value_head_size, is_causal, with_mask = CALLS[name]
    shape = (2, 4, 2, queries, keys, 16, value_head_size)
    given = operands(shape, dtype, device)
    if stored_by_token:
        given = [x.transpose(1, 2).contiguous().transpose(1, 2) for x in given]
    mask = torch.rand(queries, keys, device=device) < 0.7 if with_mask else None
    torch.library.opcheck(OPERATOR, (*given, mask, is_causal, None))


def test_errors_in_a_graph_have_the_same_sentence():
    query, key, value = operands((2, 4, 2, 5, 7, 16, 16), F32, "cpu")
    sentence = r"key: expected shape \[2, num_kv_heads, num_keys, 16\], got \[2, 2, 7, 3\]"
    with pytest.raises(ValueError, match=rf"^{sentence}$"):
        attention_with_lse(query, key[..., :3], value)
    with pytest.raises(RuntimeError, match=sentence):
        torch.compile(attention_with_lse, fullgraph=True)(query, key[..., :3], value)


NO_DERIVATIVE = "expected a tensor {}, since PyTorch's kernels give no derivative of the lse"
NO_GRAD = NO_DERIVATIVE.format("that does not require grad")
NO_TANGENT = NO_DERIVATIVE.format("without a forward-mode tangent")


def squares(function):
    return lambda *args: function(*args)[0].square().sum()


DERIVATIVES = {
    "grad": (lambda f, x: torch.func.grad(squares(f))(x), NO_GRAD),
    "vjp": (lambda f, x: torch.func.vjp(f, x), NO_GRAD),
    "jacrev": (lambda f, x: torch.func.jacrev(squares(f))(x), NO_GRAD),
    "jvp": (lambda f, x: torch.func.jvp(f, (x,), (torch.ones_like(x),)), NO_TANGENT),
    "jacfwd": (lambda f, x: torch.func.jacfwd(squares(f))(x), NO_TANGENT),
}


@pytest.mark.parametrize("name", DERIVATIVES)
def test_a_derivative_is_refused_and_not_zero(name):
    query, key, value = operands((2, 4, 2, 5, 7, 16, 16), F32, "cpu")
    derivative, refusal = DERIVATIVES[name]
    for function in (
        lambda x: attention_with_lse(x, key, value),
        lambda x: OPERATOR(x, key, value, None, False, None),
    ):
        with pytest.raises(ValueError, match=f"^query: {refusal}"):
            derivative(function, query)


@pytest.mark.parametrize("compiled", [False, True])
def test_the_operator_refuses_grad(compiled):
    query, key, value = operands((2, 4, 2, 5, 7, 16, 16), F32, "cpu")
    value.requires_grad_()

    def call():
        return OPERATOR(query, key, value, None, False, None)

    run = torch.compile(call, fullgraph=True, backend="aot_eager") if compiled else call
    error = RuntimeError if compiled else ValueError
    with pytest.raises(error, match=f"value: {NO_GRAD}"):
        run()
    with torch.no_grad():
        assert not run()[0].requires_grad


@pytest.mark.parametrize("path", ["chosen", "matmul"])
@pytest.mark.parametrize("lower", [BF16, F16], ids=str)
@pytest.mark.parametrize("dtype", [F32, F64, BF16], ids=str)
def test_autocast_lowers_nothing(dtype, lower, path, device, monkeypatch):
    """Nor what is computed a second time, nor the product that tells what a mask lets through."""
    if path == "matmul":
        monkeypatch.setattr(pytorch, "_choose", lambda *_: "matmul")
    query, key, value, mask = masked(33, 70, device, dtype)
    query[0, :, 4], mask[0, 0, 4] = 0, torch.arange(70, device=device) == 5  # an LSE of 0
    for options in ({}, {"is_causal": True}):
        for given in (mask, additive(mask, dtype), None):
            expected = attention_with_lse(query, key, value, given, **options)
            with torch.autocast(device, lower):
                assert torch.is_autocast_enabled(device)
                state = check(query, key, value, given, **options)
                assert torch.is_autocast_enabled(device)
            assert_same(state, expected)


@pytest.mark.parametrize("backend", ["eager", "aot_eager", "inductor"])
@pytest.mark.parametrize("kind", ["plain", "causal", "mask"])
@pytest.mark.parametrize("unknown", ["batch", "queries", "keys"])
def test_sizes_that_are_not_known_while_compiling(unknown, kind, backend, device):
    query, key, value = operands((3, 4, 2, 12, 12, 16, 16), F32, device)
    mask = torch.rand(12, 12, device=device) < 0.6 if kind == "mask" else None

    def attend(query, key, value):
        return attention_with_lse(query, key, value, mask, is_causal=kind == "causal")

    expected = attend(query, key, value)
    marked = {
        "batch": [(query, 0), (key, 0), (value, 0)],
        "queries": [(query, 2)],
        "keys": [(key, 2), (value, 2)],
    }[unknown]
    for operand, dimension in marked:
        torch._dynamo.decorators.mark_unbacked(operand, dimension)
    torch._dynamo.reset()
    with torch.no_grad():
        state = torch.compile(attend, fullgraph=True, backend=backend)(query, key, value)
    for mine, other in zip(state, expected, strict=True):
        torch.testing.assert_close(mine, other, rtol=0, atol=0)
