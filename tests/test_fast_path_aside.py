"""What the eager fast path leaves to torch.ops: operands, modes and transforms, each by itself."""

import contextlib

import pytest
import torch
from support import (
    LSES,
    PLAIN_SHAPE,
    ROWS,
    Recording,
    assert_bits,
    check,
    needs_bounds,
    plain,
    refuses,
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


class Subclass(torch.Tensor):
    pass


def freed(values: torch.Tensor, left: int = 0) -> torch.Tensor:
    values.untyped_storage().resize_(left)
    return values


RIGHT = {  # what becomes of an operand
    "a subclass": lambda x: x.as_subclass(Subclass),
    "a parameter": lambda x: torch.nn.Parameter(x, requires_grad=False),
    "the negative bit": lambda x: torch.complex(x, -x).conj().imag,
    "zeros without memory": lambda x: torch._efficientzerotensor(x.shape),
}


@pytest.mark.parametrize(("kind", "name"), [
    *((kind, "suffix_output") for kind in RIGHT),
    ("a subclass", "output"), ("a parameter", "output"),
])  # fmt: skip
def test_an_unusual_operand_passes_it_by(kind, name, taken):
    call = plain(empty=False)
    still = plain(empty=False)
    if "zeros" in kind:
        still.suffix_output.zero_()
    expected = check(still).output
    taken.clear()
    changed = call._replace(**{name: RIGHT[kind](getattr(call, name))})
    merge(*changed)
    assert_bits(changed.output.as_subclass(torch.Tensor).data, expected)
    assert taken == [False]


NO_MEMORY = (ValueError, "{name}: expected memory, got a null data pointer")
NO_KERNEL = (NotImplementedError, "Could not run 'merge_attn_states::merge_attn_states'")
NO_TENSOR = (TypeError, "{name}: expected a torch.Tensor, got ")
FUNCTIONAL = (RuntimeError, r"Found a custom \(non-ATen\) operator whose output has alias")
REFUSED = {  # what becomes of an operand, and what is said of it
    "a freed storage": (lambda x: freed(x.clone()), *NO_MEMORY),
    "a freed storage behind an offset": (lambda x: freed(torch.stack([x, x])[1]), *NO_MEMORY),
    "meta": (lambda x: x.to("meta"), ValueError, "(prefix|suffix)_output: expected device "),
    "sparse": (torch.Tensor.to_sparse, *NO_KERNEL),
    "mkldnn": (torch.Tensor.to_mkldnn, *NO_KERNEL),
    "nested": (lambda x: torch.nested.as_nested_tensor([*x]), *NO_KERNEL),
    "jagged": (
        lambda x: torch.nested.as_nested_tensor([*x], layout=torch.jagged),
        NotImplementedError,
        "merge_attn_states",
    ),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), *NO_KERNEL),
    "a functional wrapper": (torch._to_functional_tensor, *FUNCTIONAL),
    "a functional wrapper with an offset": (
        lambda x: torch._to_functional_tensor(torch.stack([x, x])[1]),
        *FUNCTIONAL,
    ),
    "a list": (torch.Tensor.tolist, *NO_TENSOR),
    "none": (lambda _: None, *NO_TENSOR),
}
REFUSED_OUTPUT = {
    "the negative bit": (
        RIGHT["the negative bit"],
        ValueError,
        "output: .*negative bit",
    ),
    "zeros without memory": (
        RIGHT["zeros without memory"],
        ValueError,
        "output: expected memory of its own",
    ),
}


# A null pointer with an offset, which every operand here has, is not null.
BEHIND_AN_OFFSET = (
    "a freed storage behind an offset",
    "a functional wrapper",
    "a functional wrapper with an offset",
)


@pytest.mark.filterwarnings("ignore:.*(nested|quantiz).*")
@pytest.mark.parametrize(("kind", "name"), [
    *((kind, name) for kind in REFUSED for name in ("output", "suffix_output")),
    *((kind, "output") for kind in REFUSED_OUTPUT),
])  # fmt: skip
def test_an_operand_without_plain_memory_is_refused(kind, name, taken):
    if kind in BEHIND_AN_OFFSET:
        needs_bounds(merge)
    make, error, text = (REFUSED | REFUSED_OUTPUT)[kind]
    call = plain(empty=False)
    values = getattr(call, name)
    unusual = make(torch.zeros_like(values) if name == "output" else values)
    with refuses(error, "^" + text.format(name=name)):
        merge(*call._replace(**{name: unusual}))
    assert taken == [False]
    assert call.output.isnan().all()


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_a_storage_that_is_too_small_is_seen(name, device, taken):
    """On a GPU too, where a write past it would change another tensor in silence."""
    needs_bounds(merge)
    call = plain(device, empty=False)
    small = freed(getattr(call, name).clone(), left=16)
    with refuses(ValueError, rf"^{name}: expected elements inside its memory of 16"):
        merge(*call._replace(**{name: small}))
    assert taken == [None]


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_what_requires_grad_passes_it_by(name, taken):
    call = plain()
    getattr(call, name).requires_grad_()
    with pytest.raises(ValueError, match=rf"^{name}: .*grad"):
        merge(*call)
    assert taken == [False]


def test_what_was_computed_from_it_requires_grad_too(taken):
    call = plain()
    with pytest.raises(ValueError, match=r"^prefix_output: .*grad"):
        merge(*call._replace(prefix_output=call.prefix_output.requires_grad_() * 1))
    assert taken == [False]


class Two:
    def __index__(self):
        return 2


def test_a_count_with_an_index_passes_it_by(taken):
    check(plain(count=2), lambda *args: merge(*args[:6], Two()))
    assert taken == [False]


@pytest.mark.parametrize(
    ("count", "error"),
    [(True, TypeError), (2.0, TypeError), (torch.tensor(2), TypeError), (2**63, ValueError)],
    ids=repr,
)
def test_a_count_that_is_no_plain_int_passes_it_by(count, error, taken):
    call = plain(count=2)._replace(prefill_tokens_with_context=count)
    with pytest.raises(error, match=r"^prefill_tokens_with_context: expected "):
        merge(*call)
    assert taken == [False]
    assert call.output.isnan().all()
