"""What a mask hides reaches no row, whatever it holds, and what a row sees, it shows."""

import pytest
import torch
from attention_support import additive, check, operands
from hypothesis import given
from hypothesis import strategies as st
from support import BF16, F16, F32, F64, INF, NAN

from merge_attn_states.integrations import _pytorch_kernels as kernels
from merge_attn_states.integrations import pytorch
from merge_attn_states.integrations.pytorch import attention_with_lse

CPU_FLASH = "_scaled_dot_product_flash_attention_for_cpu"
CUDA_FLASH = "_scaled_dot_product_flash_attention"


class InPlaceOf:
    """A function in the place of one of PyTorch's operators, which keeps its overloads."""

    def __init__(self, monkeypatch, name, function):
        self.operator, self.function = getattr(torch.ops.aten, name), function
        monkeypatch.setattr(torch.ops.aten, name, self)

    def __getattr__(self, name):
        return getattr(self.operator, name)

    def __call__(self, *args, **options):
        return self.function(*args, **options)


@pytest.fixture(params=["chosen", "matmul"])
def path(request, monkeypatch):
    """The kernel that is chosen here, and the one of a mask on CUDA and of other devices."""
    if request.param == "matmul":
        monkeypatch.setattr(pytorch, "_choose", lambda *_: "matmul")


@pytest.mark.parametrize(
    "shape",
    [(), (7,), (1,), (5, 1), (1, 7), (5, 7), (4, 1, 1), (4, 5, 7), (2, 1, 1, 7), (2, 4, 5, 7)],
    ids=str,
)
def test_a_mask_broadcasts(shape, device):
    query, key, value = operands((2, 4, 2, 5, 7, 16, 16), F32, device)
    mask = torch.rand(shape, device=device) < 0.5
    check(query, key, value, mask)
    check(query, key, value, torch.zeros_like(mask))  # nobody sees anything
    check(query, key, value, mask.expand(2, 4, 5, 7))  # strides of 0
    check(query, key, value, torch.rand(7, 5, 4, 2, device=device).permute(3, 2, 1, 0) < 0.5)


def hide(kind, dtype, device):
    """Of nine queries and keys, what hides the last two keys from all rows but the last."""
    mask = torch.ones(9, 9, dtype=torch.bool, device=device)
    mask[:-1, 7:] = False
    if kind == "a mask for all rows":
        mask = mask[:1]
    return {
        "causal": {"is_causal": True},
        "bool": {"attn_mask": mask},
        "additive": {"attn_mask": additive(mask, dtype) + 0.25},
        "a mask for all rows": {"attn_mask": mask},
        "a mask beside causality": {"attn_mask": mask, "is_causal": True},
    }[kind]


def unlike(state, other):
    """Rows [batch, num_heads, num_queries] that differ in a bit of the output or in the LSE."""
    outputs, lses = zip(state, other, strict=True)
    return torch.ne(*outputs).any(-1) | torch.ne(*lses)


@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("where", ["key", "value", "both"])
@pytest.mark.parametrize(
    "kind", ["causal", "bool", "additive", "a mask for all rows", "a mask beside causality"]
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_a_hidden_key_changes_no_bit(dtype, kind, where, broken, path, device):
    """Of a row that it is hidden from; the last row sees it and shows it."""
    query, key, value = operands((2, 4, 2, 9, 9, 16, 24), dtype, device)
    options = hide(kind, dtype, device)
    clean = attention_with_lse(query, key, value, **options)
    if where != "value":
        key[:, :, 7:, 3] = broken
    if where != "key":
        value[:, :, 7:, 5] = broken
    state = check(query, key, value, options.pop("attn_mask", None), **options)
    sees = torch.zeros(9, dtype=torch.bool, device=device)
    sees[7 if kind == "causal" else 8 :] = kind != "a mask for all rows"
    assert not unlike(state, clean)[..., ~sees].any()
    assert unlike(state, clean)[..., sees].all()


@pytest.mark.parametrize("scale", [None, 1e-3, 1e3])
@pytest.mark.parametrize("where", ["key", "both"])
@pytest.mark.parametrize(
    "kind", ["causal", "bool", "additive", "a mask for all rows", "a mask beside causality"]
)
@pytest.mark.parametrize("dtype", [F32, F16, BF16, F64], ids=str)
def test_a_hidden_key_may_be_huge(dtype, kind, where, scale, path, device):
    """So large, and finite, that its score is infinite: of no bit of a row that does not see it."""
    query, key, value = operands((2, 4, 2, 9, 9, 16, 24), dtype, device)
    options = hide(kind, dtype, device) | {"scale": scale}
    clean = attention_with_lse(query, key, value, **options)
    key[:, :, 7:] = torch.finfo(dtype).max
    if where == "both":
        value[:, :, 7:] = torch.finfo(dtype).max
    query[0, 0, 8, 0] = INF  # of the last row alone, which sees every key
    state = attention_with_lse(query, key, value, **options)
    sees = torch.zeros(9, dtype=torch.bool, device=device)
    sees[7 if kind == "causal" else 8 :] = True
    assert not unlike(state, clean)[..., ~sees].any()


@pytest.mark.parametrize(
    ("queries", "keys"),
    [
        (40, 600),  # keys in two blocks of the CPU kernel
        (1, 600),  # decode
        (300, 300),  # causal: rows in blocks of 32 and more
        (40, 17),  # more queries than keys
    ],
)
@pytest.mark.parametrize("dtype", [F32, BF16], ids=str)
def test_sizes_beyond_a_block(queries, keys, dtype, path, device):
    query, key, value = operands((1, 2, 1, queries, keys, 64, 64), dtype, device)
    mask = torch.rand(1, 1, queries, keys, device=device) < 0.7
    mask[..., keys // 3] = mask[..., -1] = False
    key[:, :, keys // 3], value[:, :, -1] = NAN, INF
    _, lse = check(query, key, value, mask)
    assert not lse.isnan().any()
    check(query, key, value, is_causal=True)


@pytest.mark.parametrize("queries", [1, 5])
@pytest.mark.parametrize("broken", [NAN, INF])
def test_unwritten_slots_of_a_cache(broken, queries, device, monkeypatch):
    """Nothing is computed twice for them, and what was written gives what it gives alone."""
    query, key, value = operands((2, 4, 2, queries, 40, 32, 32), BF16, device)
    lengths = torch.tensor([40, 13], device=device)
    mask = (torch.arange(40, device=device) < lengths[:, None])[:, None, None]
    key[1, :, 13:] = value[1, :, 13:] = broken
    if device == "cpu":
        monkeypatch.setattr(kernels, "matmul", lambda *_: pytest.fail("computed twice"))
    output, lse = check(query, key, value, mask)
    alone = check(query[1:], key[1:, :, :13], value[1:, :, :13])
    torch.testing.assert_close(output[1:], alone[0], rtol=0, atol=1e-2)
    torch.testing.assert_close(lse[1:], alone[1], rtol=0, atol=1e-4)


@given(st.data())
def test_any_mask_and_any_broken_number(data):
    draw = data.draw
    shape = [draw(st.integers(1, most)) for most in (2, 2, 2, 9, 20, 9, 9)]
    shape[1] *= shape[2]
    torch.manual_seed(draw(st.integers(0, 1 << 30)))
    query, key, value = operands(shape, F32, "cpu")
    for operand in (key, value):
        operand[torch.rand(operand.shape) < 0.02] = draw(st.sampled_from([NAN, INF, -INF]))
    sizes = [draw(st.sampled_from([1, full])) for full in (shape[0], shape[1], *shape[3:5])]
    mask = torch.rand(sizes) < draw(st.sampled_from([0.2, 0.7]))
    mask = draw(st.sampled_from([None, mask, additive(mask, F32)]))
    check(query, key, value, mask, is_causal=draw(st.booleans()))


@pytest.fixture
def recomputed(monkeypatch):
    """How many rows matmul was given, of each call."""
    rows, real = [], kernels.matmul

    def counted(query, *args):
        rows.append(query.shape[:3].numel())
        return real(query, *args)

    monkeypatch.setattr(kernels, "matmul", counted)
    return rows


def test_a_row_without_a_key_is_not_computed_twice(recomputed):
    """An LSE of 0 is looked into where the mask does not explain it, and nowhere else."""
    query, key, value = operands((2, 4, 4, 5, 7, 16, 16), F32, "cpu")
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3] = False
    check(query, key, value, mask)
    assert recomputed == []


@pytest.mark.parametrize("as_sum", [False, True])
def test_only_rows_with_an_lse_of_zero_are_computed_twice(as_sum, recomputed):
    query, key, value = operands((2, 4, 2, 5, 7, 16, 16), F32, "cpu")
    mask = torch.ones(5, 7, dtype=torch.bool)
    mask[3] = torch.arange(7) == 2  # one key, whose score is 0 for these queries
    query[0, 1:4, 3] = 0
    _, lse = check(query, key, value, additive(mask, F32) if as_sum else mask)
    assert (lse[0, 1:4, 3] == 0).all()
    assert recomputed == [1, 2]  # by the KV head: query heads 0 and 1, 2 and 3


def test_only_rows_that_see_a_broken_key_are_computed_twice(recomputed):
    query, key, value = operands((2, 4, 2, 5, 7, 16, 16), F32, "cpu")
    mask = torch.ones(2, 1, 5, 7, dtype=torch.bool)
    mask[1, 0, 1:, 6] = False
    key[1, 0, 6, 0] = NAN
    check(query, key, value, mask)
    assert recomputed == [2]
    value[1, 1, 4, 0] = INF
    check(*(x[:, :, -5:] for x in (query, key, value)), is_causal=True)  # keys 4 and 6: 2 and 4
    assert recomputed[1:] == [2, 6]


def test_many_rows_are_computed_twice_in_blocks(recomputed, monkeypatch):
    monkeypatch.setattr(kernels, "_SCORES_AT_ONCE", 3 * 7)
    query, key, value = operands((1, 2, 1, 5, 7, 16, 16), F32, "cpu")
    value[..., 0, 0] = NAN
    check(query, key, value, torch.rand(5, 7) < 0.7)
    assert len(recomputed) > 1
    assert max(recomputed) <= 3


@pytest.mark.parametrize("where", [1, 2])
def test_the_cpu_kernel_meets_finite_numbers_alone(where, monkeypatch):
    """Processors differ in what their exponential makes of NaN."""
    met, real = [], getattr(torch.ops.aten, CPU_FLASH)

    def looked_at(query, key, value, *args, **options):
        met.append(bool(key.isfinite().all() and value.isfinite().all()))
        return real(query, key, value, *args, **options)

    InPlaceOf(monkeypatch, CPU_FLASH, looked_at)
    given = operands((1, 2, 2, 4, 17, 16, 16), F32, "cpu")
    given[where][0, 1, 3, 5] = NAN
    output, lse = check(*given)
    assert met == [True]
    assert output[0, 1, :, 5].isnan().all()
    assert not output[0, 0].isnan().any()
    assert lse[0, 1].isnan().all() == (where == 1)


def test_what_the_cpu_kernel_calls_infinite_is_nan(monkeypatch):
    """An exponential that makes a number of NaN leaves its trace in the LSE."""

    def lying(query, key, value, *args, **options):
        lse = torch.zeros(query.shape[:3])
        lse[0, 0], lse[0, 1] = NAN, INF
        return value[:, :, :1].expand_as(query).clone(), lse + 1

    InPlaceOf(monkeypatch, CPU_FLASH, lying)
    output, lse = attention_with_lse(*operands((1, 3, 3, 4, 5, 16, 16), F32, "cpu"))
    assert lse[0, :2].isnan().all()
    assert output[0, :2].isnan().all()
    assert output[0, 2].isfinite().all()


def cuda_flash(query, key, value, dropout, is_causal, return_mask, *, scale):
    """What PyTorch's CUDA kernel does, on any device: hidden scores -inf, hidden values times 0."""
    key, value = (x.repeat_interleave(query.shape[1] // key.shape[1], 1) for x in (key, value))
    scores = query.float() @ key.float().mT * scale
    if is_causal:
        square = torch.ones(scores.shape[2:], dtype=torch.bool)
        scores.masked_fill_(~square.tril(scores.shape[3] - scores.shape[2]), -INF)
    lse = scores.logsumexp(-1)
    output = (scores.softmax(-1) @ value.float()).to(query.dtype)
    return output, lse.masked_fill_(~lse.isfinite(), INF), None


@pytest.mark.parametrize(("queries", "keys"), [(9, 9), (4, 9), (12, 9)])
@pytest.mark.parametrize("broken", [NAN, INF, -INF])
@pytest.mark.parametrize("where", [1, 2])
def test_causal_beside_cudas_kernel(where, broken, queries, keys, monkeypatch):
    InPlaceOf(monkeypatch, CUDA_FLASH, cuda_flash)
    monkeypatch.setattr(pytorch, "_choose", lambda *_: "cuda_flash")
    given = operands((2, 4, 2, queries, keys, 16, 12), BF16, "cpu")
    clean = attention_with_lse(*given, is_causal=True)
    given[where][:, :, 7, 3] = broken
    state = check(*given, is_causal=True)
    assert not unlike(state, clean)[..., :-2].any()
    assert unlike(state, clean)[..., -2:].all()
