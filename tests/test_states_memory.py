"""What calls of many parts allocate: their results, and nothing beside them."""

import itertools

import pytest
import torch
from states_support import make_states
from support import BF16, F32, Recording
from torch.profiler import ProfilerActivity, profile
from update_support import state_and_block

import merge_attn_states
from merge_attn_states import merge_states, update_state
from merge_attn_states._library import fast_path

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
    return max(itertools.accumulate(changes(run), initial=0))


def given_out(run, device: str) -> int:
    """All bytes that PyTorch's allocator gave out, also what it had back before the next."""
    if device == "cuda":
        run()
        before = torch.cuda.memory_stats()["allocated_bytes.all.allocated"]
        run()
        return torch.cuda.memory_stats()["allocated_bytes.all.allocated"] - before
    return sum(size for size in changes(run) if size > 0)


def changes(run) -> list[int]:
    """The bytes that a run on the CPU takes, and those it gives back as negative numbers."""
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
        run()
    events = [x for x in seen.profiler.kineto_results.events() if x.name() == "[memory]"]
    return [event.nbytes() for event in sorted(events, key=lambda event: event.start_ns())]


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


def of_masked_stacks(states, device):
    masks = [torch.zeros(ROWS, dtype=torch.bool, device=device)] * 3
    outputs, lses = torch.stack(states.outputs), torch.stack(states.lses)
    return states._replace(outputs=outputs, lses=lses, dim=0, empty=masks)


TO_THE_OPERATOR = {  # calls that the fast path leaves to it
    "many parts": lambda states, _: states._replace(
        outputs=states.outputs * 6, lses=states.lses * 6
    ),
    "a gradient of outputs": lambda states, _: states._replace(
        outputs=[states.outputs[0].requires_grad_(), *states.outputs[1:]]
    ),
    "a gradient of LSEs": lambda states, _: states._replace(
        lses=[*states.lses[:2], states.lses[2].requires_grad_()]
    ),
    "a gradient of a sink": lambda states, device: states._replace(
        sink=torch.zeros(ROWS[-1], device=device, requires_grad=True)
    ),
    "a parameter": lambda states, device: states._replace(
        sink=torch.nn.Parameter(torch.zeros(ROWS[-1], device=device), requires_grad=False)
    ),
    "a tuple of masks": lambda states, _: states._replace(empty=(None, None, None)),
    "masks of a stack": of_masked_stacks,
}


@pytest.mark.parametrize("case", TO_THE_OPERATOR)
def test_what_the_operator_merges_is_made_once(case, device):
    states = TO_THE_OPERATOR[case](make_states(ROWS, HEAD_SIZE, 3, F32, device), device)
    out, lse = states.run()
    assert given_out(states.run, device) == bytes_of(out, lse)
    assert given_out(states._replace(out_dtype=BF16).run, device) == bytes_of(out.bfloat16(), lse)
    assert given_out(states._replace(return_lse=False).run, device) == bytes_of(out)


def test_what_vmap_merges_is_made_once(device):
    states = make_states((2, *ROWS), HEAD_SIZE, 3, F32, device)

    def run():
        return torch.vmap(lambda *operands: merge_states(*operands))(states.outputs, states.lses)

    assert given_out(run, device) == bytes_of(*run())


@pytest.mark.parametrize(("count", "answers"), [(16, [True]), (17, [])])
def test_the_fast_path_is_asked_for_as_many_parts_as_it_takes(count, answers, device, monkeypatch):
    path, why = fast_path("merge_states")
    if path is None:
        pytest.skip(why)
    given = []

    def record(*args):
        given.append((args, path(*args)))
        return given[-1][1]

    monkeypatch.setattr(merge_attn_states.states, "_fast_merge", record)
    states = make_states(ROWS, HEAD_SIZE, count, F32, device)
    out, lse = states.run()
    assert [merged for _, merged in given] == answers
    assert path(out, lse, *states[:8], None) is (count == 16)


@pytest.mark.parametrize("dim", [None, 0, 1, 2])
@pytest.mark.parametrize("count", [2, 5, 17])
def test_a_backward_call_allocates_the_gradients(count, dim, device):
    """Of all outputs one tensor, and of all LSEs one; nothing in the dtype of the arithmetic."""
    states = make_states(ROWS, HEAD_SIZE, count, BF16, device, empty=False)
    outputs, lses = states.outputs, states.lses
    if dim is not None:
        outputs, lses = torch.stack(outputs, dim), torch.stack(lses, dim)
    operands = [*outputs, *lses] if dim is None else [outputs, lses]
    for operand in operands:
        operand.requires_grad_()
    results = merge_states(outputs, lses, dim=dim)
    of_results = [torch.ones_like(x) for x in results]
    grads = torch.autograd.grad(results, operands, of_results, retain_graph=True)
    assert len({grad.untyped_storage().data_ptr() for grad in grads}) == 2

    def backward():
        torch.autograd.grad(results, operands, of_results, retain_graph=True)

    del grads
    assert given_out(backward, device) == bytes_of(*operands)
    assert peak(backward, device) == bytes_of(*operands)
