"""What calls of many parts allocate: their results, and nothing beside them."""

import itertools

import pytest
import torch
from states_support import make_states
from support import BF16, F32, Recording
from torch.profiler import ProfilerActivity, profile
from update_support import state_and_block

from merge_attn_states import merge_states, update_state

# All results are whole blocks of 512 bytes, and smaller than what CUDA's allocator may round up.
ROWS, HEAD_SIZE = (32, 4), 128


def peak(run, device: str) -> int:
    """The most bytes that PyTorch's allocator had given out at once, beyond those of before."""
    if device == "cuda":
        run()  # what PyTorch makes once
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [x for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    sizes = [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]
    return max(itertools.accumulate(sizes, initial=0))


def bytes_of(*tensors: torch.Tensor) -> int:
    return sum(tensor.nbytes for tensor in tensors)


@pytest.mark.parametrize("indexed", [False, True])
@pytest.mark.parametrize("dtypes", [(F32, F32), (F32, BF16)], ids=str)
def test_an_update_allocates_nothing(dtypes, indexed, device):
    state, block = state_and_block(ROWS, HEAD_SIZE, dtypes, device)
    index = {"index": torch.arange(32, device=device)} if indexed else {}

    def run():
        update_state(*state, *block, **index)

    assert peak(run, device) == 0
    with Recording() as mode:
        run()
    assert [str(op) for op in mode.seen] == ["merge_attn_states.update_state.default"]


@pytest.mark.parametrize("count", [2, 5, 17])
@pytest.mark.parametrize("stacked", [False, True])
def test_a_merge_allocates_its_results(stacked, count, device):
    states = make_states(ROWS, HEAD_SIZE, count, BF16, device)
    if stacked:
        outputs, lses = torch.stack(states.outputs, 1), torch.stack(states.lses, 1)
        states = states._replace(outputs=outputs, lses=lses, dim=1)
    out, lse = states.run()
    assert peak(states.run, device) == bytes_of(out, lse)
    assert peak(states._replace(return_lse=False).run, device) == bytes_of(out)
    assert peak(states._replace(out=out, return_lse=False).run, device) == 0
    assert peak(states._replace(out=out, out_lse=lse).run, device) == 0
    part, of_part = (x[0] for x in states.parts)
    assert peak(states._replace(out=part, out_lse=of_part).run, device) == 0


@pytest.mark.parametrize("count", [2, 5, 17])
def test_a_backward_call_allocates_the_gradients(count, device):
    """Of all outputs one tensor, and of all LSEs one; nothing in the dtype of the arithmetic."""
    states = make_states(ROWS, HEAD_SIZE, count, BF16, device, empty=False)
    operands = [x.requires_grad_() for x in (*states.outputs, *states.lses)]
    results = merge_states(states.outputs, states.lses)
    of_results = [torch.ones_like(x) for x in results]
    grads = torch.autograd.grad(results, operands, of_results, retain_graph=True)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 2

    def backward():
        torch.autograd.grad(results, operands, of_results, retain_graph=True)

    del grads
    assert peak(backward, device) == bytes_of(*operands)
