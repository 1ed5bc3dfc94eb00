"""Two parts as engines merge them: their own kernels, and the functions that stand for them here.

SGLang's and FlashInfer's Triton kernels run on the CPU by Triton's interpreter, which reads the
environment variable when a kernel is defined and when it is launched.
"""

import ast
import inspect
import math

import pytest
import torch
from support import BF16, F16, F32, INF, NAN

from merge_attn_states import merge_attn_states, merge_states
from merge_attn_states.integrations import flashinfer, sglang

from . import packages
from .support import assert_replaces, exact

TOKENS, HEADS, SIZE = 6, 5, 16  # the interpreter takes a program's steps one by one


@pytest.fixture
def interpreted(monkeypatch):
    pytest.importorskip("triton", reason="no Triton: a PyTorch for CUDA brings it, 285 MB")
    pytest.importorskip("numpy", reason="Triton's interpreter needs NumPy")
    monkeypatch.setenv("TRITON_INTERPRET", "1")


def states(count, dtype, size=SIZE, device="cpu"):
    return [
        (
            torch.randn(TOKENS, HEADS, size).to(dtype).to(device),
            (3 + 2 * torch.randn(TOKENS, HEADS)).to(device),
        )
        for _ in range(count)
    ]


@pytest.mark.parametrize("size", [16, 20])  # 20: no multiple of a pack, which is theirs to pad
@pytest.mark.parametrize("dtype", [F32, F16])  # the interpreter's NumPy knows no bfloat16
def test_sglang(interpreted, adopter, dtype, size):
    theirs = adopter("sglang", "sglang/kernels/ops/attention/merge_state.py")
    a, b = states(2, dtype, size)
    merged = theirs.merge_state_triton(*a, *b)
    assert_replaces(sglang.merge_state(*a, *b), merged, exact([a, b]))
    given = torch.empty_like(a[0]), torch.empty_like(a[1])
    sglang.merge_state(*a, *b, *given)
    assert_replaces(given, merged, exact([a, b]))


def test_sglang_where_no_part_saw_a_key(interpreted, adopter):
    theirs = adopter("sglang", "sglang/kernels/ops/attention/merge_state.py")
    a, b = states(2, F32)
    a[1][0], b[1][0] = -INF, INF
    a[1][1], a[0][1] = -INF, NAN
    merged, _ = theirs.merge_state_triton(*a, *b)
    assert merged[:2].isnan().all()
    out, lse = sglang.merge_state(*a, *b)
    assert (out[0] == 0).all()
    assert (lse[0] == -INF).all()
    assert torch.equal(out[1], b[0][1])


def flashinfer_kernels(adopter):
    return adopter("flashinfer", "flashinfer/triton/kernels/cascade.py")


@pytest.mark.parametrize("dtype", [F32, F16])
def test_flashinfers_triton_kernels(interpreted, adopter, dtype):
    kernels = flashinfer_kernels(adopter)
    a, b = states(2, dtype)
    shape = {"num_heads": HEADS, "head_dim": SIZE, "bdx": SIZE, "bdy": HEADS}
    expected = exact([a, b], lse_base="2")
    merged = torch.empty_like(a[0]), torch.empty_like(a[1])
    kernels.merge_state_kernel[(TOKENS,)](*a, *b, *merged, **shape)
    assert_replaces(flashinfer.merge_state(*a, *b), merged, expected)

    mask = torch.tensor([1, 0, 1, 1, 0, 1]).bool()
    theirs, ours = (tuple(x.clone() for x in a) for _ in range(2))
    kernels.merge_state_in_place_kernel[(TOKENS,)](*theirs, *b, mask_ptr=mask, **shape)
    flashinfer.merge_state_in_place(*ours, *b, mask)
    kept = exact([a], lse_base="2")
    rows = mask[:, None, None], mask[:, None]
    chosen = [torch.where(*x) for x in zip(rows, expected, kept, strict=True)]
    assert_replaces(ours, theirs, chosen)
    assert torch.equal(ours[0][~mask], a[0][~mask])

    parts = states(4, dtype)
    stack = torch.stack([o for o, _ in parts], 1), torch.stack([x for _, x in parts], 1)
    kernels.merge_states_kernel[(TOKENS,)](*stack, *merged, num_index_sets=4, **shape)
    assert_replaces(flashinfer.merge_states(*stack), merged, exact(parts, lse_base="2"))


def test_names_and_defaults_are_flashinfers():
    source = packages.root_of("flashinfer") / "flashinfer" / "cascade.py"
    if not source.is_file():
        pytest.skip("flashinfer is not here: `make test-adopters` fetches it")
    for function in ast.parse(source.read_text()).body:
        if isinstance(function, ast.FunctionDef) and function.name in flashinfer.__all__:
            ours = inspect.signature(getattr(flashinfer, function.name)).parameters
            assert list(ours) == [argument.arg for argument in function.args.args]
            defaults = [p.default for p in ours.values() if p.default is not p.empty]
            assert defaults == [default.value for default in function.args.defaults]


def test_names_and_defaults_are_sglangs(adopter):
    theirs = adopter("sglang", "sglang/kernels/ops/attention/merge_state.py")
    parameters = inspect.signature(theirs.merge_state_triton).parameters
    ours = inspect.signature(sglang.merge_state).parameters
    assert list(ours) == list(parameters)
    assert [p.default for p in ours.values()] == [p.default for p in parameters.values()]


@pytest.fixture
def real_flashinfer(cuda):
    """Their CUDA kernels, where a GPU is and FlashInfer is installed."""
    return pytest.importorskip("flashinfer.cascade", reason="FlashInfer is not installed")


@pytest.mark.parametrize("dtype", [F16, BF16])
def test_flashinfer_itself(real_flashinfer, dtype):
    a, b, *more = states(6, dtype, size=128, device="cuda")
    expected = exact([a, b], lse_base="2")
    ours = flashinfer.merge_state(*a, *b)
    assert_replaces(ours, real_flashinfer.merge_state(*a, *b), expected)
    for mask in (None, torch.tensor([1, 0, 1, 1, 0, 1], device="cuda").bool()):
        theirs, ours = (tuple(x.clone() for x in a) for _ in range(2))
        real_flashinfer.merge_state_in_place(*theirs, *b, mask)
        flashinfer.merge_state_in_place(*ours, *b, mask)
        kept = exact([a], lse_base="2")
        chosen = expected
        if mask is not None:
            rows = mask[:, None, None], mask[:, None]
            chosen = [torch.where(*x) for x in zip(rows, expected, kept, strict=True)]
        assert_replaces(ours, theirs, chosen)
    stack = torch.stack([o for o, _ in more], 1), torch.stack([x for _, x in more], 1)
    ours, theirs = flashinfer.merge_states(*stack), real_flashinfer.merge_states(*stack)
    assert_replaces(ours, theirs, exact(more, lse_base="2"))


@pytest.mark.parametrize("dtype", [F32, BF16, F16])
def test_vllm_with_flashinfers_attention(dtype):
    """By its formula: two base-2 LSEs [T, H], which vLLM transposes, copies and multiplies first.

    One call without the four kernels before it, and with the LSE that the next merge wants.
    """
    a, b = states(2, dtype)
    natural = [lse.T.contiguous() * math.log(2) for _, lse in (a, b)]
    out, out_lse = torch.empty_like(a[0]), torch.empty_like(natural[0])
    merge_attn_states(out, a[0], natural[0], b[0], natural[1], out_lse)
    ours = merge_states([a[0], b[0]], [a[1], b[1]], lse_base="2", out_lse_base="e")
    expected = exact([a, b], lse_base="2", out_lse_base="e")
    assert_replaces(ours, (out, out_lse.T), expected)
