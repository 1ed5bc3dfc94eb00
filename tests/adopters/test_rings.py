"""A running state: one line, `update_state`, in the place of the step of five rings."""

from types import SimpleNamespace

import pytest
import torch
from support import BF16, F16, F32, INF, NAN

from merge_attn_states import update_state

from .support import assert_replaces, blocks, exact

DTYPES = [F32, BF16, F16]
pytestmark = pytest.mark.filterwarnings("ignore:`torch.jit.script` is deprecated")  # theirs


def started(like: torch.Tensor, dtype=F32, trailing=True):
    """A state before its first block: nothing is known of its values."""
    lse = torch.full((*like.shape[:-1], 1) if trailing else like.shape[:-1], -INF)
    return torch.full_like(like, NAN, dtype=dtype), lse


def by_token(parts):
    return [(output, lse.transpose(1, 2)) for output, lse in parts]


@pytest.fixture(params=["yunchang", "ring_flash_attn"])
def ring(request, adopter):
    modules = {"yunchang": "yunchang.ring.utils", "ring_flash_attn": "ring_flash_attn/utils.py"}
    return adopter(request.param, modules[request.param]).update_out_and_lse


@pytest.mark.parametrize("count", [1, 2, 8])
@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_of_flash_attention(ring, dtype, count):
    parts = blocks(count, dtype)
    theirs = None, None
    for block_out, block_lse in parts:
        theirs = ring(*theirs, block_out, block_lse)
    out, lse = started(parts[0][0])
    for block_out, block_lse in parts:
        update_state(out, lse, block_out, block_lse.transpose(1, 2))
    assert_replaces((out, lse), theirs, exact(by_token(parts)))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_ring_in_zigzag_updates_the_second_half(ring, dtype):
    whole, *halves = blocks(4, dtype)
    half = whole[0].shape[1] // 2
    halves = [(output[:, half:], lse[:, :, half:].contiguous()) for output, lse in halves]
    second = slice(None), slice(half, None)
    theirs = ring(None, None, *(x.clone() for x in whole))  # the state is the block's own memory
    out, lse = theirs[0].clone(), theirs[1].clone()
    for block_out, block_lse in halves:
        theirs = ring(*theirs, block_out, block_lse, slice_=second)
        update_state(out[second], lse[second], block_out, block_lse.transpose(1, 2))
    first = exact(by_token([(whole[0][:, :half], whole[1][:, :, :half])]))
    last = exact(by_token([(whole[0][:, half:], whole[1][:, :, half:]), *halves]))
    expected = [torch.cat(pair, 1) for pair in zip(first, last, strict=True)]
    assert_replaces((out, lse), theirs, expected)


def test_rows_without_a_key_are_not_a_number_there(ring):
    """Masked by a document's border, a row may see nothing in the first blocks."""
    parts = blocks(3, F32)
    for _, lse in parts[:2]:
        lse[:, :, 0] = -INF
    for _, lse in parts:
        lse[:, :, 1] = -INF
    theirs = None, None
    out, lse = started(parts[0][0])
    for block_out, block_lse in parts:
        theirs = ring(*theirs, block_out, block_lse)
        update_state(out, lse, block_out, block_lse.transpose(1, 2))
    expected, _ = exact(by_token(parts))
    assert theirs[0][:, :2].isnan().all()
    torch.testing.assert_close(out, expected.float())
    assert (lse[:, 1] == -INF).all()


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("of_cudnn", [False, True])
@pytest.mark.parametrize("dtype", DTYPES)
def test_pytorchs_context_parallel(dtype, of_cudnn, convert):
    """[B, H, S, D]; cuDNN's LSE has a trailing 1; later steps are of the second half alone."""
    private = "torch.distributed.tensor.experimental._context_parallel._attention"
    merger = getattr(pytest.importorskip(private), "_SDPAMerger", None)
    if merger is None:
        pytest.skip("this PyTorch has no _SDPAMerger")
    whole, *later = blocks(4, dtype, by_head=True)
    half = whole[0].shape[2] // 2
    halves = [(output[:, :, half:], lse[:, :, half:]) for output, lse in later[1:]]
    merging = merger(convert_to_f32=convert, seq_dim=2)
    out, lse = started(whole[0], F32 if convert else dtype, trailing=of_cudnn)
    for parts, partial in (([whole, later[0]], False), (halves, True)):
        for block_out, block_lse in parts:
            block_lse = block_lse[..., None] if of_cudnn else block_lse
            merging.step(block_out, block_lse, partial)
            rows = slice(None), slice(None), slice(half if partial else 0, None)
            update_state(out[rows], lse[rows], block_out, block_lse)
    first = exact([(output[:, :, :half], x[:, :, :half]) for output, x in (whole, later[0])])
    last = [(output[:, :, half:], x[:, :, half:]) for output, x in (whole, later[0])]
    last = exact(last + halves)
    expected = [torch.cat(pair, 2) for pair in zip(first, last, strict=True)]
    assert_replaces((out.to(dtype), lse), merging.results(), expected)


@pytest.mark.parametrize("trailing", [False, True])
@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("dtype", [F32, BF16])
def test_diffusers_ring(adopter, monkeypatch, dtype, convert, trailing):
    """Its forward runs as it is; the group is three ranks in one process, of which this is 1."""
    dispatch = adopter("diffusers", "diffusers.models.attention_dispatch")
    ranks, rank = 3, 1
    parts = [(output, lse.transpose(1, 2)) for output, lse in blocks(ranks, dtype)]
    parts = [(output, lse[..., None] if trailing else lse) for output, lse in parts]
    keys = [torch.full((1, 2), float(r)) for r in range(ranks)]  # a key says whose block it is

    def gathered(buffer, gather_dim, group):
        assert torch.equal(buffer, torch.cat([keys[rank].flatten()] * 2))
        return torch.cat([torch.cat([key.flatten()] * 2) for key in keys])

    def forward_op(ctx, query, key, value, *_, **__):
        assert torch.equal(key, value)
        return parts[int(key[0, 0])]

    monkeypatch.setattr(dispatch.funcol, "all_gather_tensor", gathered)
    parallel = SimpleNamespace(
        _ring_mesh=SimpleNamespace(get_group=lambda: None),
        _ring_local_rank=rank,
        ring_degree=ranks,
        convert_to_fp32=convert,
    )
    theirs = dispatch.TemplatedRingAttention.forward(
        SimpleNamespace(),
        parts[0][0],
        keys[rank],
        keys[rank],
        None,
        *(0.0, False, None, False, True),
        forward_op,
        None,
        SimpleNamespace(context_parallel_config=parallel),
    )
    out, lse = started(parts[0][0], F32 if convert else dtype, trailing=False)
    for step in range(ranks):
        update_state(out, lse, *parts[(rank + step) % ranks])
    assert_replaces((out.to(dtype), lse), theirs, exact(parts))


@pytest.mark.parametrize("layout", ["bshd", "sbhd"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_transformer_engines_second_half(dtype, layout):
    """By its formula: out holds two chunks, [B, 2, S / 2, H, D], and each step has its LSE.

    Theirs adds up LSEs in every step and weighs all outputs at the end, sum_p exp(lse_p - lse) O_p;
    the second chunk is `out.select(seq_dim, 1)`. The LSE is [B, H, S] in both layouts.
    """
    whole, *steps = blocks(3, dtype)
    half = whole[0].shape[1] // 2
    steps = [(output[:, half:], lse[:, :, half:]) for output, lse in steps]
    parts = [(whole[0][:, half:], whole[1][:, :, half:]), *steps]
    lse = torch.stack([x for _, x in parts]).logsumexp(0)
    weighed = [o.float() * (x - lse).exp().transpose(1, 2)[..., None] for o, x in parts]
    theirs = sum(weighed), lse.transpose(1, 2)

    batch, _, heads, size = whole[0].shape
    out = whole[0].to(F32, copy=True).view(batch, 2, half, heads, size)
    softmax_lse = whole[1].clone()
    seq_dim = 1
    if layout == "sbhd":
        out, seq_dim = out.permute(1, 2, 0, 3, 4).contiguous(), 0
        steps = [(output.transpose(0, 1).contiguous(), x) for output, x in steps]
    chunk = out.select(seq_dim, 1)
    lse_of_chunk = softmax_lse.view(batch, heads, 2, half)[:, :, 1]  # [B, H, S / 2]
    order = (0, 2, 1) if layout == "bshd" else (2, 0, 1)
    for block_out, block_lse in steps:
        update_state(chunk, lse_of_chunk.permute(order), block_out, block_lse.permute(order))
    ours = chunk if layout == "bshd" else chunk.transpose(0, 1)
    assert_replaces((ours, lse_of_chunk.transpose(1, 2)), theirs, exact(by_token(parts)))
    first = whole[0][:, :half].float()
    kept = out.select(seq_dim, 0)
    assert torch.equal(kept if layout == "bshd" else kept.transpose(0, 1), first)
    assert torch.equal(softmax_lse[:, :, :half], whole[1][:, :, :half])
