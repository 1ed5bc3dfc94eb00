"""The eager fast path: plain tensors take it and get what torch.ops gives; others pass it by."""

import contextlib
import gc
import os
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import torch
from support import BF16, E4M3, F16, F32, F64, LSES, ROWS, Call, assert_bits, check, make_call
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from merge_attn_states import merge_attn_states as merge
from merge_attn_states._library import fast_path, load_python_module

OP = torch.ops.merge_attn_states.merge_attn_states
N, H, D = 5, 3, 64


def plain(device="cpu", **options) -> Call:
    return make_call((N, H, D), options.pop("dtype", F32), device, **options)


def test_it_is_there():
    pytest.importorskip("merge_attn_states._C", reason="_C is not built for this CPython")
    assert fast_path()[1] == ""


# Plain tensors.

PLAIN = {
    "contiguous": {},
    "no output_lse": {"output_lse": False},
    "a count": {"count": 2},
    "an FP8 output": {"dtype": BF16, "output_dtype": E4M3, "scale": 0.5},
    "FP8": {"dtype": E4M3, "scale": 0.5},
    "float16": {"dtype": F16},
    "float64": {"dtype": F64},
    "LSEs stored [N, H]": {"strides": dict.fromkeys(LSES, (1, H))},
    "LSE rows of longer buffers": {"strides": dict.fromkeys(LSES, (N + 4, 1))},
    "LSEs with no stride of 1": {"strides": dict.fromkeys(LSES, (2 * N, 2))},
    "padded heads": {"strides": dict.fromkeys(ROWS, (H * 96, 96, 1))},
    "[H, N, D] storage": {"strides": dict.fromkeys(ROWS, (D, N * D, 1))},
    "an element stride": {"strides": dict.fromkeys(ROWS, (2 * H * D, 2 * D, 2))},
    "an offset": {"offsets": dict.fromkeys(ROWS, 8)},
}


@pytest.mark.parametrize("case", PLAIN)
def test_plain_tensors_take_it(case, device, taken):
    options = PLAIN[case]
    check(plain(device, **options))
    by_keyword = plain(device, **options)
    check(by_keyword, lambda *args: merge(**Call(*args)._asdict()))
    assert taken == [True, True]
    dispatched = plain(device, **options)
    OP(*dispatched)
    assert_bits(by_keyword.output, dispatched.output)
    if by_keyword.output_lse is not None:
        assert_bits(by_keyword.output_lse, dispatched.output_lse)


@pytest.mark.parametrize("context", [torch.no_grad, torch.inference_mode, torch.enable_grad])
def test_every_grad_mode_takes_it(context, taken):
    with context():
        check(plain())
    assert taken == [True]


def test_autocast_takes_it(taken):
    with torch.autocast("cpu", BF16):
        check(plain())
    assert taken == [True]


@pytest.mark.parametrize("shape", [(0, H, D), (N, 0, D), (N, H, 0)])
def test_operands_without_elements_take_it(shape, device, taken):
    merge(*make_call(shape, F32, device, empty=False))
    assert taken == [True]


def test_a_leaf_under_no_grad_takes_it(taken):
    call = plain()
    call.prefix_output.requires_grad_()
    with torch.no_grad():
        check(call)
    assert taken == [True]


def test_the_module_takes_positions_and_names():
    path, why = fast_path()
    if path is None:
        pytest.skip(why)
    for split in range(len(Call._fields) + 1):
        call = plain(count=3)
        named = {name: getattr(call, name) for name in Call._fields[split:]}
        check(call, lambda *args, split=split, named=named: path(*args[:split], **named))
    call = plain()
    assert path(*call[:5]) is True
    untouched = plain()
    assert path(*untouched[:4]) is False
    assert path(*untouched, None) is False
    assert path(*untouched, out=None) is False
    assert path(*untouched[:5], output=untouched.output) is False
    assert untouched.output.isnan().all()


# Errors.

DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


@pytest.mark.parametrize("name", ["output", "prefix_output", "suffix_lse", "output_scale"])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_a_refused_dtype_has_one_text(dtype, name):
    try:
        other = torch.empty(1 if name == "output_scale" else (N, H, D), dtype=dtype)
        other = other.expand(1) if name == "output_scale" else other
    except (RuntimeError, NotImplementedError):
        pytest.skip("this PyTorch makes no tensor of it")
    call = plain(dtype=BF16)._replace(**{name: other})
    texts = []
    for way in (merge, OP):
        try:
            way(*call)
            texts.append(None)
        except Exception as error:
            texts.append((type(error), str(error)))
    assert texts[0] == texts[1]


def test_an_error_comes_from_it(device, taken):
    call = plain(device)
    with pytest.raises(ValueError, match=r"^suffix_lse: expected shape "):
        merge(*call._replace(suffix_lse=call.suffix_lse.T))
    assert taken == [None]
    assert call.output.isnan().all()


# What has to be seen by PyTorch, or is more than memory with strides.


class Watching(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_function__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


class Recording(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
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
    assert True not in taken


def test_make_fx_before_dispatch_records_the_op(taken):
    graph = make_fx(lambda *args: merge(*args), pre_dispatch=True)(*plain(empty=False)[:6])
    assert OP.default in [node.target for node in graph.graph.nodes]
    assert True not in taken


@pytest.mark.filterwarnings("ignore:.*torch.jit.trace.*:DeprecationWarning")
def test_jit_trace_records_the_op(taken):
    def step(*args):
        merge(*args)
        return args[0] + 0

    traced = torch.jit.trace(step, plain()[:5], check_trace=False)
    assert "merge_attn_states" in str(traced.graph)
    assert True not in taken


def test_fake_tensors(taken):
    with FakeTensorMode() as mode:
        merge(*(mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in plain()))
    fakes = [mode.from_tensor(x) if isinstance(x, torch.Tensor) else x for x in plain()]
    merge(*fakes)  # outside of their mode
    assert taken == [False, False]


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
    with contextlib.suppress(RuntimeError):  # what PyTorch says of the op is in test_library.py
        TRANSFORMS[transform](lambda *args: merge(*args), plain(empty=False))
    assert taken == [False]


class Subclass(torch.Tensor):
    pass


def negative(values: torch.Tensor) -> torch.Tensor:
    """The same values by memory of the other sign, with the strides of any tensor."""
    return torch._neg_view(-values)


def freed(values: torch.Tensor, left: int = 0) -> torch.Tensor:
    values.untyped_storage().resize_(left)
    return values


# (what becomes of an operand, whether the call is still right)
UNUSUAL = {
    "a subclass": (lambda x: x.as_subclass(Subclass), True),
    "a parameter": (lambda x: torch.nn.Parameter(x, requires_grad=False), True),
    "the negative bit": (negative, True),
    "the negative bit and a stride": (lambda x: torch.complex(x, -x).conj().imag, True),
    "zeros without memory": (lambda x: torch._efficientzerotensor(x.shape), True),
    "a freed storage": (lambda x: freed(x.clone()), False),
    "a freed storage behind an offset": (lambda x: freed(torch.stack([x, x])[1]), False),
    "meta": (lambda x: x.to("meta"), False),
    "sparse": (torch.Tensor.to_sparse, False),
    "mkldnn": (torch.Tensor.to_mkldnn, False),
    "nested": (lambda x: torch.nested.as_nested_tensor([*x]), False),
    "jagged": (lambda x: torch.nested.as_nested_tensor([*x], layout=torch.jagged), False),
    "quantized": (lambda x: torch.quantize_per_tensor(x, 0.1, 0, torch.qint8), False),
    "a functional wrapper": (torch._to_functional_tensor, False),
    "a functional wrapper with an offset": (
        lambda x: torch._to_functional_tensor(torch.stack([x, x])[1]),
        False,
    ),
    "a list": (torch.Tensor.tolist, False),
    "none": (lambda _: None, False),
}


@pytest.mark.filterwarnings("ignore:.*(nested|quantiz).*")
@pytest.mark.parametrize("name", ["output", "suffix_output"])
@pytest.mark.parametrize("kind", UNUSUAL)
def test_an_unusual_operand_passes_it_by(kind, name, taken):
    make, right = UNUSUAL[kind]
    call = plain(empty=False)
    still = plain(empty=False)
    if "zeros" in kind:
        still.suffix_output.zero_()
    expected = check(still).output
    taken.clear()
    if name == "output" and ("negative" in kind or "zeros" in kind):
        right = False
    values = getattr(call, name)
    unusual = make(torch.zeros_like(values) if name == "output" else values)
    if right:
        changed = call._replace(**{name: unusual})
        merge(*changed)
        assert_bits(changed.output.as_subclass(torch.Tensor).data, expected)
    else:
        with pytest.raises(Exception):  # noqa: B017, PT011  PyTorch's own for half of them
            merge(*call._replace(**{name: unusual}))
    assert taken == [False]


@pytest.mark.parametrize("name", [*ROWS, *LSES])
def test_a_storage_that_is_too_small_is_seen(name, device, taken):
    """On a GPU too, where a write past it would change another tensor in silence."""
    call = plain(device, empty=False)
    small = freed(getattr(call, name).clone(), left=16)
    with pytest.raises(ValueError, match=rf"^{name}: expected elements inside its memory of 16"):
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


@pytest.mark.parametrize("count", [Two(), True, 2.0, torch.tensor(2), 2**63], ids=repr)
def test_a_count_that_is_no_plain_int_passes_it_by(count, taken):
    call = plain(count=2)._replace(prefill_tokens_with_context=count)
    with contextlib.nullcontext() if type(count) is Two else pytest.raises((TypeError, ValueError)):
        merge(*call)
    assert taken == [False]


# Autograd.


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_the_version_counter_is_raised(context, device, taken):
    call = plain(device)
    before = [x._version for x in call[:6]]
    with context():
        merge(*call)
    raised = [x._version - old for x, old in zip(call[:6], before, strict=True)]
    assert raised == ([0] * 6 if context is torch.inference_mode else [1, 0, 0, 0, 0, 1])
    assert taken == [True]


def test_an_inference_tensor_has_no_version(taken):
    with torch.inference_mode():
        call = plain()
    check(call)
    with torch.no_grad():
        check(call._replace(output_lse=None))
    assert taken == [True, True]


def test_backward_refuses_a_saved_tensor_that_was_overwritten(device, taken):
    call = plain(device, empty=False)
    weight = torch.ones((N, H, D), device=device, requires_grad=True)
    loss = (weight * call.output).sum()  # saves output
    merge(*call)
    assert taken == [True]
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


# A million calls, and many threads.


def resident_bytes() -> int:
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


def test_a_million_calls_leave_nothing_behind():
    path, why = fast_path()
    if path is None:
        pytest.skip(why)
    call = make_call((1, 1, 8), F32, count=1)
    refused = call._replace(prefix_lse=call.prefix_lse.new_zeros(2, 2))
    aside = call._replace(suffix_lse=torch.nn.Parameter(call.suffix_lse, requires_grad=False))
    objects = [*call, *refused, *aside, True, False, None, 1]

    def many(times):
        for _ in range(times):
            path(*call)
        for _ in range(times // 50):
            path(*aside)
            path(**aside._asdict())
            with contextlib.suppress(ValueError):
                path(*refused)

    many(1000)
    gc.collect()
    references = [sys.getrefcount(x) for x in objects]
    memory = resident_bytes()
    many(1_000_000)
    gc.collect()
    # 3.12 and newer: None, True, False and 1 are immortal, and never change.
    grown = [sys.getrefcount(x) - old for x, old in zip(objects, references, strict=True)]
    assert all(abs(change) < 100 for change in grown), grown
    assert resident_bytes() - memory < 2**22


def test_threads_have_states_of_their_own(taken):
    """One thread is traced, the others are not; and what they share is not mixed up."""
    inside, done = threading.Event(), threading.Event()
    seen = []

    def traced():
        with Recording() as mode:
            inside.set()
            done.wait(60)
            merge(*plain())
            seen.extend(mode.seen)

    watcher = threading.Thread(target=traced)
    watcher.start()
    assert inside.wait(60)
    calls = [plain(seed=seed) for seed in range(16)]
    workers = [threading.Thread(target=merge, args=call) for call in calls]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    assert taken == [True] * 16
    done.set()
    watcher.join()
    assert taken[16:] == [False]
    assert OP.default in seen
    for seed, call in enumerate(calls):
        assert_bits(call.output, check(plain(seed=seed)).output)


# CUDA; graphs, streams and devices for every way in are in test_cuda.py.


@pytest.mark.parametrize("where", ["a graph", "a side stream", "another device"])
def test_it_is_taken_there_too(where, cuda, taken):
    if where == "another device":
        if torch.cuda.device_count() < 2:
            pytest.skip("one CUDA device")
        check(plain(f"{cuda}:1"))
    elif where == "a graph":
        call = plain(cuda)
        merge(*call)
        with torch.cuda.graph(torch.cuda.CUDAGraph()):
            merge(*call)
    else:
        with torch.cuda.stream(torch.cuda.Stream()):
            check(plain(cuda))
    assert taken
    assert set(taken) == {True}


# Without it.

MISSING = {
    "_C": "import sys; sys.modules['merge_attn_states._C'] = None",
    "the DLPack exchange API": "import torch; del torch.Tensor.__dlpack_c_exchange_api__",
    "PyTorch's word on a thread": "import torch; del torch._C._dispatch_tls_local_include_set",
    "PyTorch's word on a tensor": "import torch; del torch._neg_view",
}
WITHOUT = """
from support import F32, make_call, check
from merge_attn_states import _info, ops
assert ops._fast is None
check(make_call((5, 3, 64), F32, count=2))
print(next(line for line in _info.lines() if line.startswith("eager fast path")))
"""


@pytest.mark.parametrize("missing", MISSING)
def test_without_it_every_call_goes_through_torch_ops(missing, child_environment):
    ran = subprocess.run(
        [sys.executable, "-c", MISSING[missing] + WITHOUT],
        env=child_environment,
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.startswith("eager fast path       no: ")
    assert ran.stdout.endswith("; calls go through torch.ops\n")


@pytest.mark.parametrize("context", ["inference_mode()", "no_grad()", "device('meta')"])
def test_it_is_there_wherever_the_package_is_imported(context, child_environment):
    load = "import torch\nwith torch." + context + ":\n    from merge_attn_states import ops\n"
    if load_python_module()[0] is None:
        pytest.skip("_C is not built for this CPython")
    subprocess.run(
        [sys.executable, "-c", load + "assert ops._fast is not None"],
        env=child_environment,
        check=True,
    )
