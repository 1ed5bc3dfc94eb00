"""merge_states and update_state inside torch.func's transforms."""

import pytest
import torch
from states_support import make_states
from support import BF16, F32, assert_bits

from merge_attn_states import merge_states, update_state

SIZE = 5


def batches(count=3, device="cpu", rows=(4, 2)):
    """The parts of each sample, and all samples' as tensors with the batch first."""
    samples = [make_states(rows, 8, count, F32, device, seed=i) for i in range(SIZE)]
    outputs = [torch.stack([s.outputs[k] for s in samples]) for k in range(count)]
    lses = [torch.stack([s.lses[k] for s in samples]) for k in range(count)]
    return samples, outputs, lses


def assert_each(merged, samples, **options):
    for i, sample in enumerate(samples):
        out, lse = sample._replace(**{k: v(i) for k, v in options.items()}).run()
        assert_bits(merged[0][i], out)
        assert_bits(merged[1][i], lse)


@pytest.mark.parametrize("rows", [(4,), (4, 2), (2, 3, 2)])
def test_vmap_over_lists(rows, device):
    samples, outputs, lses = batches(device=device, rows=rows)
    merged = torch.vmap(lambda o, x: merge_states(o, x))(outputs, lses)
    assert_each(merged, samples)


@pytest.mark.parametrize("at", [0, 1, 2])
def test_vmap_over_a_dimension_anywhere_and_over_a_stack(at, device):
    samples, outputs, lses = batches(device=device)
    outputs, lses = [x.movedim(0, at) for x in outputs], [x.movedim(0, at) for x in lses]
    merged = torch.vmap(lambda o, x: merge_states(o, x), in_dims=at)(outputs, lses)
    assert_each(merged, samples)
    stacked = torch.stack(outputs, -2), torch.stack(lses, -1)  # [*rows, parts] without the batch
    merged = torch.vmap(lambda o, x: merge_states(o, x, dim=2), in_dims=at)(*stacked)
    assert_each(merged, samples)


def test_what_is_shared_is_not_batched(device):
    samples, outputs, lses = batches(device=device)
    sink = torch.tensor([0.5, 2.0], device=device)
    masks = torch.rand(SIZE, 4, 2, device=device) < 0.4

    def merge(o, x, mask):
        first = samples[0]
        return merge_states(
            [o, first.outputs[1]], [x, first.lses[1]], empty=[mask, None], sink=sink
        )

    merged = torch.vmap(merge)(outputs[0], lses[0], masks)
    for i in range(SIZE):
        out, lse = merge(outputs[0][i], lses[0][i], masks[i])
        assert_bits(merged[0][i], out)
        assert_bits(merged[1][i], lse)


def test_vmap_without_an_lse(device):
    samples, outputs, lses = batches(device=device)
    merged = torch.vmap(lambda o, x: merge_states(o, x, return_lse=False)[0])(outputs, lses)
    for i, sample in enumerate(samples):
        assert_bits(merged[i], sample.run()[0])


def test_what_vmap_cannot_batch_is_refused(device):
    _, outputs, lses = batches(device=device)
    index = torch.zeros(3, dtype=torch.int64, device=device)
    with pytest.raises(ValueError, match=r"index: expected none under torch\.vmap"):
        torch.vmap(lambda o, x: merge_states([o], [x], index=[index]))(outputs[0], lses[0])
    with pytest.raises(ValueError, match="sink: expected one that vmap does not batch"):
        torch.vmap(lambda o, x, s: merge_states([o], [x], sink=s))(
            outputs[0], lses[0], torch.zeros(SIZE, 2, device=device)
        )


@pytest.mark.parametrize("transform", [torch.func.grad, torch.func.vjp], ids=["grad", "vjp"])
def test_a_transform_that_pytorch_has_no_rule_for_is_an_error(transform, device):
    """An operator's gradient is not for functorch: an error of PyTorch's, and never a zero."""
    _, outputs, lses = batches(device=device)

    def loss(o):
        return merge_states([o], [lses[0]])[0].sum()

    arguments = (loss, outputs[0]) if transform is torch.func.vjp else (loss,)
    with pytest.raises(RuntimeError, match=r"functorch|torch\.func"):
        made = transform(*arguments)
        made(outputs[0])


def test_forward_mode_is_an_error(device):
    _, outputs, lses = batches(device=device)
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(outputs[0], torch.ones_like(outputs[0]))
        with pytest.raises(ValueError, match=r"outputs\[0\]: expected .* forward-mode tangent"):
            merge_states([dual], [lses[0]])
    state, lse = torch.zeros_like(outputs[0]), torch.zeros_like(lses[0])
    with torch.autograd.forward_ad.dual_level():
        dual = torch.autograd.forward_ad.make_dual(outputs[0], torch.ones_like(outputs[0]))
        with pytest.raises(ValueError, match="block_out: expected a tensor without a forward-mode"):
            update_state(state, lse, dual, lses[1])


def test_autocast_changes_nothing(device):
    samples, *_ = batches(device=device)
    out, lse = samples[0].run()
    with torch.autocast(device, BF16):
        cast, cast_lse = samples[0].run()
    assert_bits(cast, out)
    assert_bits(cast_lse, lse)
