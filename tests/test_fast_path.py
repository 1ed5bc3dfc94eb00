"""The eager fast path: plain tensors take it and get what torch.ops gives.

What it leaves to torch.ops is in test_fast_path_aside.py, a million calls and many threads in
test_fast_path_load.py.
"""

import pytest
import torch
from support import (
    BF16,
    E4M3,
    F16,
    F32,
    F64,
    LSES,
    OPERATOR_ERROR,
    PLAIN_SHAPE,
    ROWS,
    Call,
    assert_bits,
    check,
    make_call,
    plain,
)

from merge_attn_states import merge_attn_states as merge
from merge_attn_states._library import fast_path

OP = torch.ops.merge_attn_states.merge_attn_states
N, H, D = PLAIN_SHAPE


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


def test_the_module_takes_every_argument_by_its_position():
    path, why = fast_path()
    if path is None:
        pytest.skip(why)
    check(plain(count=3), path)
    untouched = plain()
    assert path(*untouched[:5]) is False
    assert path(*untouched, None) is False
    assert untouched.output.isnan().all()


# Errors.

DTYPES = sorted({x for x in vars(torch).values() if isinstance(x, torch.dtype)}, key=str)


def is_quantized(dtype):
    return str(dtype).startswith(("torch.qint", "torch.quint"))


def said_by(way, call):
    """The type and the text of what the call raises."""
    with pytest.raises(Exception) as caught:  # noqa: PT011  told by its type and text below
        way(*call)
    return caught.type, str(caught.value)


@pytest.mark.parametrize("name", ["output", "prefix_output", "suffix_lse", "output_scale"])
@pytest.mark.parametrize("dtype", [x for x in DTYPES if x != BF16], ids=str)
def test_a_refused_dtype_has_one_text(dtype, name):
    try:
        other = torch.empty(1 if name == "output_scale" else (N, H, D), dtype=dtype)
        other = other.expand(1) if name == "output_scale" else other
    except (RuntimeError, NotImplementedError):
        pytest.skip("this PyTorch makes no tensor of it")
    call = plain(dtype=BF16)._replace(**{name: other})
    kind, text = said_by(merge, call)
    operators_kind, operators_text = said_by(OP, call)
    assert text == operators_text
    if is_quantized(dtype):  # the dispatcher finds no kernel
        assert kind is operators_kind is NotImplementedError
    else:
        assert (kind, operators_kind) == (ValueError, OPERATOR_ERROR)


def test_an_error_comes_from_it(device, taken):
    call = plain(device)
    with pytest.raises(ValueError, match=r"^suffix_lse: expected shape "):
        merge(*call._replace(suffix_lse=call.suffix_lse.T))
    assert taken == [None]
    assert call.output.isnan().all()


# Autograd; what it has to see for every way in is in test_autograd.py.


@pytest.mark.parametrize("context", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_versions_rise_outside_of_inference_mode(context, device, taken):
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
