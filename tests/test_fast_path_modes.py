"""The modes, traces and transforms to which the eager fast path leaves a call."""

import contextlib

import pytest
import torch
from support import (
    PLAIN_SHAPE,
    Recording,
    assert_bits,
    check,
    plain,
)
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.autograd import forward_ad
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode

from merge_attn_states import merge_attn_states as merge

OP = torch.ops.merge_attn_states.merge_attn_states
N, H, D = PLAIN_SHAPE


class Watching(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("mode", [Watching, Recording])
def test_a_mode_sees_the_op(mode, taken):
    call = plain()
    with mode() as mode:
        merge(*call)
    assert any(func in (OP, OP.default) for func in mode.seen)
    assert taken == [False]
    check(plain())
    assert taken[1:] == [True], "the mode is over"


def test_a_default_device_is_a_mode(taken):
    call = plain()
    with torch.device("cpu"):
        merge(*call)
    assert taken == [False]


def test_compiled_code_does_not_ask(taken):
    torch._dynamo.reset()
    check(plain(), torch.compile(lambda *args: merge(*args), fullgraph=True, backend="aot_eager"))
    assert taken == []


def test_make_fx_records_the_op(taken):
    call = plain(empty=False)
    graph = make_fx(lambda *args: merge(*args))(*call[:6])
    assert OP.default in [node.target for node in graph.graph.nodes]
    assert taken == [False]


def test_make_fx_before_dispatch_records_the_op(taken):
    graph = make_fx(lambda *args: merge(*args), pre_dispatch=True)(*plain(empty=False)[:6])
    assert OP.default in [node.target for node in graph.graph.nodes]
    assert taken == [False]


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_jit_trace_records_the_op(taken):
    def step(*args):
        merge(*args)
        return args[0] + 0

    traced = torch.jit.trace(step, plain()[:5], check_trace=False)
    assert "merge_attn_states" in str(traced.graph)
    assert taken == [False]


def test_fake_tensors(taken):
    with FakeTensorMode() as mode:
        merge(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in plain()))
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in plain()]
    merge(*fakes)  # outside of their mode
    assert taken == [False, False]


# PyTorch refuses the op under the first two; test_library.py has its words.
REFUSING = ("vmap", "functionalize")
TRANSFORMS = {
    "vmap": lambda run, call: torch.vmap(run)(*(torch.stack([x, x]) for x in call[:5])),
    "functionalize": lambda run, call: torch.func.functionalize(run)(*call[:5]),
    "grad": lambda run, call: torch.func.grad(lambda x: (run(*call[:5]), x.sum())[1])(
        torch.ones(3)
    ),
    "jvp": lambda run, call: torch.func.jvp(
        lambda x: (run(*call[:5]), x)[1], (torch.ones(3),), (torch.ones(3),)
    ),
}


@pytest.mark.parametrize("transform", TRANSFORMS)
def test_a_transform_passes_it_by(transform, taken):
    call = plain(empty=False)
    refused = pytest.raises(RuntimeError, match=r"Batching rule|custom \(non-ATen\) operator")
    with refused if transform in REFUSING else contextlib.nullcontext():
        TRANSFORMS[transform](lambda *args: merge(*args), call)
    assert taken == [False]
    assert call.output.isnan().any() == (transform in REFUSING)


@pytest.mark.parametrize("transform", ["vmap", "functionalize"])
def test_a_transform_passes_it_by_in_inference_mode(transform, taken):
    """Others leave inference mode."""
    call = plain(empty=False)
    refused = pytest.raises(RuntimeError, match=r"Batching rule|custom \(non-ATen\) operator")
    with torch.inference_mode(), refused:
        TRANSFORMS[transform](lambda *args: merge(*args), call)
    assert taken == [False]
    assert call.output.isnan().all()


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_jit_trace_records_the_op_in_inference_mode(taken):
    def step(*args):
        merge(*args)
        return args[0] + 0

    with torch.inference_mode():
        traced = torch.jit.trace(step, plain()[:5], check_trace=False)
    assert "merge_attn_states" in str(traced.graph)
    assert taken == [False]


@pytest.mark.parametrize("mode", [Watching, Recording])
def test_a_mode_sees_the_op_in_inference_mode(mode, taken):
    call = plain()
    with torch.inference_mode(), mode() as mode:
        merge(*call)
    assert any(func in (OP, OP.default) for func in mode.seen)
    assert taken == [False]


def test_inference_mode_has_neither_gradients_nor_tangents(taken):
    """So that grad mode and the level of duals need not be asked: torch.ops answers the same."""
    call, expected = plain(), plain()
    merge(*expected)
    call.prefix_output.requires_grad_()
    with torch.inference_mode(), torch.enable_grad():
        for way in (merge, OP):
            with forward_ad.dual_level():
                dual = forward_ad.make_dual(call.suffix_output, call.suffix_output)
                way(*call._replace(suffix_output=dual))
            assert_bits(call.output, expected.output)
            call.output.fill_(float("nan"))
    assert taken == [True, True]


def test_a_level_of_duals_passes_it_by(taken):
    call = plain()
    with forward_ad.dual_level():
        merge(*call)
        assert taken == [False]
        dual = forward_ad.make_dual(call.prefix_output, call.prefix_output)
        with torch.no_grad(), pytest.raises(ValueError, match=r"^prefix_output: .*tangent"):
            merge(*call._replace(prefix_output=dual))
    assert taken == [False, False]
