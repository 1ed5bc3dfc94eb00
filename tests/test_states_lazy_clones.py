"""Copy-on-write clones as operands of many parts: inputs are only read, results get their own."""

import pytest
import torch
from states_support import States, everything, parts
from support import F32, OLDER_THAN_2_14, assert_bits, blank
from torch.utils._pytree import tree_map

import merge_attn_states
from merge_attn_states import merge_states, update_state

N, H, D, K = 4, 2, 8, 3


@pytest.fixture(autouse=True)
def by_the_operator(monkeypatch):
    """Before PyTorch 2.14 a fast path knows no size of memory and no sign, and copies lazy ones."""
    for name in ("_fast_merge", "_fast_update") if OLDER_THAN_2_14 else ():
        monkeypatch.setattr(merge_attn_states.states, name, None, raising=False)


def lazy_clone(value):
    return value._lazy_clone() if torch.is_tensor(value) else value


def lazy(values) -> list[bool]:
    return [torch._C._is_cow_tensor(x) for x in values]


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("stacked", [False, True])
def test_inputs_stay_lazy(stacked, context, device):
    """A lazy input of 64 MB would be copied to be read."""
    with context():
        states = everything(device)
        if stacked:
            outputs, lses = torch.stack(states.outputs), torch.stack(states.lses)
            states = states._replace(outputs=outputs, lses=lses, dim=0)
        expected, _ = states.run()
        call = States(*tree_map(lazy_clone, tuple(states)))
        inputs = [x for x in tree_map(lambda x: x, (*call,)) if torch.is_tensor(x)]
        inputs += [x for value in call if isinstance(value, list) for x in value if x is not None]
        assert len(inputs) == (5 if stacked else 9)
        out, _ = call.run()
        assert lazy(inputs) == [True] * len(inputs)
        assert_bits(out, expected)
        result = blank((N, H, D), F32, device)._lazy_clone()
        call._replace(out=result).run()
        assert lazy([result, *inputs]) == [False] + [True] * len(inputs)
        assert_bits(result, expected)


def test_a_refused_call_leaves_its_inputs_lazy():
    call = States(*tree_map(lazy_clone, tuple(everything())))
    call.lses[1] = call.lses[1].T
    with pytest.raises(ValueError, match=r"^lses\[1\]: expected shape"):
        call.run()
    assert all(lazy([*call.outputs, *call.lses, call.sink]))


def test_of_a_lazy_state_the_block_stays_lazy(device):
    states = parts(device)
    sources = [states.outputs[0], states.lses[0], states.outputs[1], states.lses[1]]
    before = [x.clone() for x in sources]
    call = [x._lazy_clone() for x in sources]
    update_state(*call)
    assert lazy(call) == [False, False, True, True]
    for source, old in zip(sources, before, strict=True):
        assert_bits(source, old)
    update_state(*sources)
    assert_bits(call[0], sources[0])
    assert_bits(call[1], sources[1])


@pytest.mark.parametrize("stacked", [False, True])
def test_a_lazy_clone_merged_in_place(stacked, device):
    """The part has to be the memory that the result becomes."""
    states = parts(device)
    expected, expected_lse = states.run()
    if stacked:
        sources = torch.stack(states.outputs), torch.stack(states.lses)
        outputs, lses = (x._lazy_clone() for x in sources)
        out, out_lse = merge_states(outputs, lses, dim=0, out=outputs[1], out_lse=lses[0])
    else:
        sources = states.outputs[1], states.lses[0]
        states.outputs[1], states.lses[0] = (x._lazy_clone() for x in sources)
        call = states._replace(out=states.outputs[1], out_lse=states.lses[0])
        out, out_lse = call.run()
    assert_bits(out, expected)
    assert_bits(out_lse, expected_lse)
    again, again_lse = (sources[0][1], sources[1][0]) if stacked else sources
    assert_bits(again, parts(device).outputs[1])
    assert_bits(again_lse, parts(device).lses[0])
