"""PyTorch's context parallel merges by update_state while it is told to."""

import pytest
import ranks_support
import torch
import torch.distributed as dist
from attention_support import reference
from states_support import States, compare
from support import BF16, F32, F64, assert_bits

from merge_attn_states import update_state
from merge_attn_states.integrations import context_parallel
from merge_attn_states.integrations.pytorch import attention_with_lse

attention = pytest.importorskip(
    "torch.distributed.tensor.experimental._context_parallel._attention"
)
LEAVES_THREADS = True  # functional collectives: see ranks_support.py


@pytest.fixture
def theirs():
    """PyTorch's own class; ours is in its place."""
    original = attention._SDPAMerger
    context_parallel.enable()
    assert attention._SDPAMerger is not original
    yield original
    context_parallel.disable()
    assert attention._SDPAMerger is original


def ring(rank, ranks, device):
    """Its ring of attention blocks gives one attention, nearer than without us, in our launches."""
    steps = []  # queries of the state that each is of

    def counted(*operands):
        steps.append(operands[0].shape[2])
        update_state(*operands)

    def attend(query, key, value, is_causal):
        return attention_with_lse(query, key, value, is_causal=is_causal)

    context_parallel.update_state = counted
    torch.manual_seed(0)  # the same operands on every rank
    size = 8 * ranks
    for is_causal, balances in ((False, False), (True, False), (True, True)):
        whole = [torch.randn(2, 3, size, 16).bfloat16() for _ in range(3)]
        due, due_lse = reference(*whole, is_causal=is_causal)
        # Balanced, a rank has one of the first chunks and one of the last: as much to do as others.
        places = torch.arange(size).chunk(2 * ranks)
        places = torch.cat(
            [places[rank], places[-1 - rank]] if balances else places[2 * rank : 2 * rank + 2]
        )
        query, key, value = (x[:, :, places].to(device) for x in whole)
        attention._cp_options.enable_load_balance = balances
        errors = []
        for is_ours in (False, True):
            (context_parallel.enable if is_ours else context_parallel.disable)()
            assert context_parallel.is_enabled() == is_ours
            out, lse = attention._templated_ring_attention(
                dist.group.WORLD, 2, attend, query, key, value, is_causal=is_causal
            )
            assert out.dtype == BF16
            torch.testing.assert_close(lse.cpu().double(), due_lse[:, :, places], rtol=0, atol=1e-3)
            errors.append((out.cpu().double() - due[:, :, places]).abs().max())
        assert errors[1] < 2e-2
        assert errors[1] <= 1.01 * errors[0]
        blocks = rank if is_causal and not balances else ranks - 1
        halves = ranks - 1 - rank if balances else 0
        assert sorted(steps) == [4] * halves + [8] * (blocks - halves)
        steps.clear()
    context_parallel.disable()


@pytest.mark.parametrize("ranks", [2, 3])
def test_a_ring(ranks, tmp_path, child_environment):
    ranks_support.run(ring, ranks, tmp_path, child_environment)


@pytest.mark.alone
def test_a_ring_of_gpus(tmp_path, child_environment):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    ranks_support.run(ring, 2, tmp_path, child_environment, "cuda")


def blocks(count, dtype, trailing=False):
    """[B, H, S, D] as flash attention gives it, of [B, S, H, D] memory."""
    outputs = [torch.randn(2, 8, 3, 16).to(dtype).transpose(1, 2) for _ in range(count)]
    lses = [torch.randn(2, 3, 8, dtype=F64 if dtype == F64 else F32) for _ in range(count)]
    return list(zip(outputs, [x[..., None] for x in lses] if trailing else lses, strict=True))


@pytest.mark.parametrize("convert", [True, False])
@pytest.mark.parametrize("trailing", [False, True])
def test_steps(trailing, convert, theirs):
    """The last one is of the second half of the queries alone."""
    whole = blocks(2, BF16, trailing)
    half = [x[:, :, 4:] for x in blocks(1, BF16, trailing)[0]]
    given = [*whole[0], *whole[1], *half]
    before = [x.clone() for x in given]
    merger = attention._SDPAMerger(convert_to_f32=convert, seq_dim=2)
    for block, partial in zip((*whole, half), (False, False, True), strict=True):
        merger.step(*block, partial=partial)
    out, lse = merger.results()
    assert (out.dtype, lse.dtype, lse.shape) == (BF16, F32, whole[0][1].shape)
    for x, was in zip(given, before, strict=True):
        assert_bits(x, was)
    for rows, last in ((slice(0, 4), []), (slice(4, 8), [half])):
        parts = [*([x[:, :, rows] for x in block] for block in whole), *last]
        outputs, lses = (list(x) for x in zip(*parts, strict=True))
        if convert:
            compare(States(outputs, lses), out[:, :, rows], lse[:, :, rows])
        else:  # each step is rounded
            due, _ = States(outputs, lses).run()
            torch.testing.assert_close(out[:, :, rows], due, rtol=2e-2, atol=2e-2)


def test_one_block_is_what_it_was(theirs):
    ((out, lse),) = blocks(1, BF16)
    merger = attention._SDPAMerger(convert_to_f32=True, seq_dim=2)
    merger.step(out, lse, partial=False)
    merged, merged_lse = merger.results()
    assert_bits(merged, out)
    assert_bits(merged_lse, lse)


def test_gradients_are_pytorchs_own(theirs):
    made = [(out.requires_grad_(), lse) for out, lse in blocks(2, F32)]
    merger = attention._SDPAMerger(convert_to_f32=False, seq_dim=2)
    for block in made:
        merger.step(*block, partial=False)
    assert isinstance(merger._original, theirs)
    merger.results()[0].sum().backward()
    assert all(out.grad is not None for out, _ in made)


@pytest.mark.parametrize("what", ["float64", "a padded LSE"])
def test_what_does_not_fit_goes_to_pytorchs_own(what, theirs):
    """The memory-efficient kernels round an LSE's length up."""
    ((out, lse),) = blocks(1, F64 if what == "float64" else F32)
    merger = attention._SDPAMerger(convert_to_f32=False, seq_dim=2)
    merger.step(out if what == "float64" else out[:, :, :7], lse, partial=False)
    assert isinstance(merger._original, theirs)


def test_enabled_twice_and_disabled_twice():
    original = attention._SDPAMerger
    for _ in range(2):
        context_parallel.enable()
        assert context_parallel.is_enabled()
    for _ in range(2):
        context_parallel.disable()
        assert not context_parallel.is_enabled()
        assert attention._SDPAMerger is original


class Other:
    def __init__(self, convert_to_f32, seq_dim, more):
        pass


@pytest.mark.parametrize("there", [Other, None])
def test_another_class_is_left_alone(there, monkeypatch):
    monkeypatch.setattr(attention, "_SDPAMerger", there)
    with pytest.raises(RuntimeError, match=r"expected _SDPAMerger\.__init__\(self, convert_to"):
        context_parallel.enable()
    assert attention._SDPAMerger is there
    assert not context_parallel.is_enabled()


def test_a_release_without_the_module(monkeypatch):
    monkeypatch.setattr(context_parallel, "_MODULE", "torch.distributed.no_such_module")
    with pytest.raises(RuntimeError, match=r"there is no torch\.distributed\.no_such_module"):
        context_parallel.enable()
