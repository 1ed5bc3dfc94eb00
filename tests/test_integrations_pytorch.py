"""attention_with_lse against float64, where PyTorch's kernels are right and where they are not."""

import inspect

import pytest
import torch
from attention_support import LSE_BOUND, OUTPUT_BOUND, additive, check, flash, operands, reference
from support import BF16, F32, F64, FLOATS, INF, NAN

from merge_attn_states import merge_attn_states
from merge_attn_states.integrations.pytorch import (
    attention_kernel,
    attention_with_lse,
    token_layout,
)

SHAPES = [  # batch, heads, KV heads, queries, keys, head size, value head size
    (1, 1, 1, 1, 1, 8, 8),  # the smallest: one score a row
    (2, 12, 12, 9, 9, 32, 32),  # all-MiniLM-L6-v2
    (2, 8, 2, 5, 70, 64, 64),  # grouped queries, more keys than one block of the CPU kernel
    (1, 4, 1, 33, 17, 128, 128),  # one KV head, more queries than keys
    (2, 2, 2, 7, 6, 192, 128),  # DeepSeek: V narrower than Q
    (1, 3, 3, 4, 5, 24, 40),  # V wider than Q
    (1, 2, 1, 6, 11, 5, 3),  # odd head sizes, no multiple of 8
    (1, 4, 1, 3, 20, 576, 512),  # DeepSeek absorbed: wider than the CUDA kernel goes
]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_without_a_mask(shape, dtype, device):
    kernel = flash(device, dtype, max(shape[5:]))
    check(*operands(shape, dtype, device), kernel=kernel)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_masked_rows(shape, dtype, device):
    query, key, value = operands(shape, dtype, device)
    mask = torch.rand(shape[0], 1, shape[3], shape[4], device=device) < 0.6
    mask[0, 0, shape[3] // 2] = False  # a query that sees no key
    kernel = flash(device, dtype, masked=True)
    _, lse = check(query, key, value, mask, kernel=kernel)
    assert (lse[0, :, shape[3] // 2] == -INF).all()
    check(query, key, value, additive(mask, dtype) + 0.5, kernel=kernel)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (9, 9),  # the square that every kernel aligns alike
        (4, 9),  # a chunk behind its context: bottom-right
        (9, 4),  # the first five queries see nothing
        (1, 9),  # decode: the newest token sees everything
        (2, 1),  # one query without and one with a key
        (130, 70),  # both beyond a block of the kernels
    ],
)
def test_causal(queries, keys, dtype, device):
    query, key, value = operands((2, 4, 2, queries, keys, 64, 64), dtype, device)
    check(query, key, value, is_causal=True, kernel=flash(device, dtype))
    mask = torch.rand(2, 1, queries, keys, device=device) < 0.7
    both = mask & torch.ones_like(mask).tril(keys - queries)
    output, lse = attention_with_lse(query, key, value, mask, is_causal=True)
    expected, expected_lse = attention_with_lse(query, key, value, both)
    assert torch.equal(output, expected)
    assert torch.equal(lse, expected_lse)
    as_sum = additive(mask, dtype)
    assert torch.equal(attention_with_lse(query, key, value, as_sum, is_causal=True)[1], lse)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize("queries", [5, 7, 9])  # of seven keys
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("scale", [0.0, 1.0, -0.3])
def test_scale(scale, dtype, queries, is_causal, device):
    query, key, value = operands((1, 2, 2, queries, 7, 24, 24), dtype, device)
    check(query, key, value, scale=scale, is_causal=is_causal)


@pytest.mark.parametrize("is_causal", [False, True])
@pytest.mark.parametrize(
    ("batch", "heads", "queries", "keys"), [(2, 4, 3, 0), (2, 4, 0, 3), (0, 4, 3, 3), (2, 0, 3, 3)]
)
def test_no_queries_or_no_keys(batch, heads, queries, keys, is_causal, device):
    shape = (batch, heads, heads, queries, keys, 16, 8)
    query, key, value = operands(shape, BF16, device)
    kernel = attention_kernel(query, key, value, is_causal=is_causal)
    output, lse = attention_with_lse(query, key, value, is_causal=is_causal)
    assert kernel == "none"
    assert output.shape == (batch, heads, queries, 8)
    assert lse.shape == (batch, heads, queries)
    assert (output == 0).all()
    assert (lse == -INF).all()
    assert (output.dtype, lse.dtype) == (BF16, F32)


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("keys", [1, 3, 7, 8, 17, 40])  # around the lanes of a CPU vector
def test_an_error_upstream_stays_visible(keys, dtype, device):
    shape = (1, 2, 2, 4, keys, 64, 64)
    for position, broken in [(0, NAN), (1, NAN), (0, INF)]:
        query, key, value = operands(shape, dtype, device)
        key[..., 0] = key[..., 0].abs()  # an infinite query gives scores of +inf
        (query, key)[position][0, 0, 0, 0] = broken
        output, lse = check(query, key, value)
        assert lse[0, 0, 0].isnan()
        assert output[0, 0, 0].isnan().all()


def test_every_score_minus_inf_is_a_row_without_keys(device):
    # -1e40 overflows to -inf in float32; the CPU kernel calls that lse = 0.
    query = torch.full((1, 1, 2, 8), 1e20, device=device)
    output, lse = attention_with_lse(query, -query[:, :, :1], query[:, :, :1])
    assert (lse == -INF).all()
    assert (output == 0).all()


def test_an_lse_of_zero_is_possible(device):
    # One key with a score of 0: the value that the CPU kernel also writes for a masked row.
    query, key, value = operands((1, 2, 2, 3, 1, 8, 8), F32, device)
    output, lse = check(torch.zeros_like(query), key, value)
    assert (lse == 0).all()
    assert torch.equal(output, value.expand_as(output))


LAYOUTS = {
    "transposed storage [B, N, H, D]": lambda x: x.transpose(1, 2).contiguous().transpose(1, 2),
    "an element stride": lambda x: x.mT.contiguous().mT,
    "a slice of wider heads": lambda x: torch.nn.functional.pad(x, (3, 8))[..., 3:-8],
    "one element off its alignment": lambda x: torch.cat([x.new_zeros(1), x.flatten()])[1:].view(
        x.shape
    ),
    "an expanded batch": lambda x: x[:1].expand(2, -1, -1, -1),
}


@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts(layout, dtype, device):
    inputs = operands((2, 4, 2, 6, 9, 64, 64), dtype, device)
    for position in range(3):
        laid = list(inputs)
        laid[position] = LAYOUTS[layout](inputs[position])
        check(*laid)


def test_matmul_takes_queries_in_blocks(device, monkeypatch):
    from merge_attn_states.integrations import _pytorch_kernels as kernels

    query, key, value = operands((2, 4, 2, 10, 7, 16, 16), F32, device)
    mask = torch.rand(2, 1, 10, 7, device=device) < 0.5
    whole = kernels.matmul(query, key, value, mask, 0.25)
    monkeypatch.setattr(kernels, "_SCORES_AT_ONCE", 3 * 2 * 4 * 7)  # 3 queries, then 3, 3, 1
    blocks = kernels.matmul(query, key, value, mask, 0.25)
    for actual, expected in zip(blocks, whole, strict=True):
        torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_matmul_where_no_kernel_fits(shape, dtype, device, monkeypatch):
    """The path of a mask on CUDA and of other devices, seen on every machine."""
    from merge_attn_states.integrations import pytorch

    monkeypatch.setattr(pytorch, "_choose", lambda *_: "matmul")
    query, key, value = operands(shape, dtype, device)
    check(query, key, value, kernel="matmul")
    check(query, key, value, is_causal=True)
    mask = torch.rand(shape[0], 1, shape[3], shape[4], device=device) < 0.6
    mask[0, 0, shape[3] // 2] = False
    check(query, key, value, mask)
    check(query, key, value, additive(mask, dtype))


@pytest.mark.parametrize("stored_by_token", [False, True])
@pytest.mark.parametrize("batch", [1, 3])
def test_token_layout(batch, stored_by_token, device):
    query, key, value = operands((batch, 4, 2, 5, 9, 64, 64), BF16, device)
    if stored_by_token:
        query = query.transpose(1, 2).contiguous().transpose(1, 2)
    state = attention_with_lse(query, key, value)
    output, lse = token_layout(*state)
    assert output.shape == (5 * batch, 4, 64)
    assert lse.shape == (4, 5 * batch)
    for b in range(batch):
        assert torch.equal(output[5 * b : 5 * b + 5], state[0][b].transpose(0, 1))
        assert torch.equal(lse[:, 5 * b : 5 * b + 5], state[1][b])
    assert output.data_ptr() == state[0].data_ptr(), "not a view"
    if batch == 1 or device == "cpu":
        assert lse.data_ptr() == state[1].data_ptr(), "not a view"


def test_token_layout_refuses_an_lse_of_another_state():
    with pytest.raises(
        ValueError, match=r"^lse: expected .* got \[2, 5, 4\] beside \[2, 4, 5, 8\]"
    ):
        token_layout(torch.zeros(2, 4, 5, 8), torch.zeros(2, 5, 4))


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
def test_two_parts_merge_to_the_whole(dtype, device):
    """The point of it all, with a part that some rows do not see."""
    query, key, value = operands((2, 8, 2, 6, 50, 64, 64), dtype, device)
    mask = torch.rand(2, 1, 6, 50, device=device) < 0.6
    mask[0, :, :3, :20] = False  # the prefix is empty for three rows
    mask[1, :, 2:, 20:] = False  # the suffix is empty for four
    mask[1, :, 3] = False  # and both for one
    states = [
        token_layout(*attention_with_lse(query, key[:, :, keys], value[:, :, keys], part))
        for keys, part in [
            (slice(0, 20), mask[..., :20]),
            (slice(20, 50), mask[..., 20:]),
        ]
    ]
    output = torch.full((12, 8, 64), NAN, dtype=dtype, device=device)
    lse = torch.full((8, 12), NAN, dtype=F64 if dtype == F64 else F32, device=device)
    merge_attn_states(output, *states[0], *states[1], output_lse=lse)
    expected, expected_lse = token_layout(*reference(query, key, value, mask))
    bound = 2 * OUTPUT_BOUND[dtype]
    torch.testing.assert_close(output.cpu().to(F64), expected, rtol=0, atol=bound)
    torch.testing.assert_close(lse.cpu().to(F64), expected_lse, rtol=0, atol=LSE_BOUND[dtype])


Q = torch.zeros(2, 4, 3, 8)
K = torch.zeros(2, 2, 5, 8)
REFUSED = {
    "query, no tensor": ((None, K, K), {}, TypeError, "query: expected a torch.Tensor, got None"),
    "query, rank": ((Q[0], K, K), {}, ValueError, "query: expected shape [batch, num_heads, num_q"),
    "key, rank": ((Q, K[0], K), {}, ValueError, "key: expected shape [batch, num_kv_heads, num_k"),
    "dtype": ((Q.int(), K, K), {}, ValueError, "query: expected dtype one of float16, bfloat16"),
    "mixed dtypes": ((Q, K, K.double()), {}, ValueError, "value: expected dtype one of float16"),
    "device": ((Q, K.to("meta"), K), {}, ValueError, "key: expected device cpu, got meta"),
    "head size 0": ((Q[..., :0], K[..., :0], K), {}, ValueError, "query: expected a head_size of"),
    "key, batch": ((Q, K[:1], K), {}, ValueError, "key: expected shape [2, num_kv_heads, num_keys"),
    "key, head size": ((Q, K[..., :4], K), {}, ValueError, "key: expected shape [2, num_kv_heads"),
    "groups": ((Q[:, :3], K, K), {}, ValueError, "key: expected num_kv_heads to divide 3, got 2"),
    "no KV heads": ((Q, K[:, :0], K[:, :0]), {}, ValueError, "key: expected num_kv_heads to divid"),
    "value, keys": ((Q, K, K[:, :, :4]), {}, ValueError, "value: expected shape [2, 2, 5, value_"),
    "scale": ((Q, K, K), {"scale": NAN}, ValueError, "scale: expected a finite number or None"),
    "mask, no tensor": ((Q, K, K, 1), {}, TypeError, "attn_mask: expected a torch.Tensor, got int"),
    "mask, shape": (
        (Q, K, K, torch.ones(3, 4).bool()),
        {},
        ValueError,
        "attn_mask: expected a shape that broadcasts to [2, 4, 3, 5]",
    ),
    "mask, rank": (
        (Q, K, K, torch.ones(1, 1, 1, 1, 5).bool()),
        {},
        ValueError,
        "attn_mask: expected a shape that broadcasts to [2, 4, 3, 5]",
    ),
    "mask, dtype": (
        (Q, K, K, torch.ones(3, 5, dtype=F64)),
        {},
        ValueError,
        "attn_mask: expected dtype torch.bool or query's dtype torch.float32, got torch.float64",
    ),
    "mask, device": (
        (Q, K, K, torch.ones(3, 5, device="meta").bool()),
        {},
        ValueError,
        "attn_mask: expected device cpu, got meta",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_refused(case):
    arguments, options, error, message = REFUSED[case]
    for function in (attention_with_lse, attention_kernel):
        with pytest.raises(error) as raised:
            function(*arguments, **options)
        assert str(raised.value).startswith(message)


@pytest.mark.parametrize("name", ["query", "key", "value", "attn_mask"])
def test_what_requires_grad_is_refused(name):
    arguments = {"query": Q, "key": K, "value": K, "attn_mask": torch.zeros(3, 5)}
    arguments[name] = arguments[name].clone().requires_grad_()
    expected = f"{name}: expected a tensor that does not require grad, since PyTorch's kernels"
    with pytest.raises(ValueError, match=f"^{expected} give no derivative of the lse; "):
        attention_with_lse(**arguments)


def test_grad_is_no_matter_without_grad_mode():
    with torch.no_grad():
        output, lse = attention_with_lse(Q, K.clone().requires_grad_(), K)
    assert not output.requires_grad
    assert not lse.requires_grad


def test_both_functions_take_the_same_arguments():
    signatures = [inspect.signature(f).parameters for f in (attention_with_lse, attention_kernel)]
    assert list(signatures[0].values()) == list(signatures[1].values())
