"""What every test of the op stands on: a call as a value, operands in any memory, one comparison.

Memory starts as bytes of 0xFF, which are NaN in every dtype: outputs start as NaN, and a read or
a write outside an operand shows. `check` runs a call and compares all of it with the reference.
"""

import contextlib
import ctypes
import os
import re
import shutil
import subprocess
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import merge_attn_states
from merge_attn_states.reference import merge_attn_states_reference

F32, F16, BF16, F64 = torch.float32, torch.float16, torch.bfloat16, torch.float64
E4M3, E5M2 = torch.float8_e4m3fn, torch.float8_e5m2
FLOATS = (F32, F16, BF16, F64)
FP8 = (E4M3, E5M2)
INF, NAN = float("inf"), float("nan")

MARGIN = 64  # elements before and after every operand; a multiple of every pack
WORDS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
ROWS = ("output", "prefix_output", "suffix_output")  # [N, H, D]
LSES = ("prefix_lse", "suffix_lse", "output_lse")  # [H, N]

TORCH = tuple(map(int, torch.__version__.split(".")[:2]))
# From 2.14 on the fast path has the bounds of a tensor's memory, and leaves an input lazy.
OLDER_THAN_2_14 = TORCH < (2, 14)
# What an operator makes of a C++ std::invalid_argument, which is a ValueError up to PyTorch 2.14.
OPERATOR_ERROR = RuntimeError if TORCH > (2, 14) else ValueError


def refusal_of(way) -> type[Exception]:
    """The type of a refusal that C++ makes: the Python function has one on every PyTorch."""
    return OPERATOR_ERROR if way is torch.ops.merge_attn_states.merge_attn_states else ValueError


def without_fast_path(*args, **kwargs):
    """The Python function as it is where the fast path is missing or steps aside."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(merge_attn_states.ops, "_fast", None)
        return merge_attn_states.merge_attn_states(*args, **kwargs)


def needs_bounds(way) -> None:
    """Skip where the way does not know how large the memory of an operand is."""
    if OLDER_THAN_2_14 and way is merge_attn_states.merge_attn_states:
        pytest.skip("before PyTorch 2.14 the fast path does not know the size of a storage")


class Call(NamedTuple):
    """The arguments of the op by their names, so that `op(*call)` and `call._asdict()` work."""

    output: torch.Tensor
    prefix_output: torch.Tensor
    prefix_lse: torch.Tensor
    suffix_output: torch.Tensor
    suffix_lse: torch.Tensor
    output_lse: torch.Tensor | None = None
    prefill_tokens_with_context: int | None = None
    output_scale: torch.Tensor | None = None


def cloned(call: Sequence) -> Call:
    """The call with operands of its own, dense."""
    return Call(*(x.clone() if isinstance(x, torch.Tensor) else x for x in call))


def blank(shape: Sequence[int], dtype, device, strides=None, offset=0) -> torch.Tensor:
    """A NaN-filled tensor that starts `offset` elements behind a 16-byte border."""
    if strides is None:
        strides = torch.empty(shape, device="meta").stride()
    extent = 1 + sum((size - 1) * stride for size, stride in zip(shape, strides, strict=True))
    if 0 in shape:
        extent = 0
    memory = torch.full(
        ((2 * MARGIN + offset + extent) * dtype.itemsize,), 0xFF, dtype=torch.uint8, device=device
    )
    return memory.view(dtype).as_strided(shape, strides, MARGIN + offset)


def place(values: torch.Tensor, device=None, strides=None, offset=0) -> torch.Tensor:
    """The values in fresh memory of that layout."""
    memory = blank(values.shape, values.dtype, device or values.device, strides, offset)
    return memory.copy_(values)


def make_call(
    shape: tuple[int, int, int],
    dtype=F32,
    device="cpu",
    *,
    output_dtype=None,
    count=None,
    scale=None,
    output_lse=True,
    empty=True,
    strides=None,
    offsets=None,
    seed=0,
) -> Call:
    """Random operands. Where they fit, rows with one part empty and with both empty are among them.

    `strides` and `offsets` go by argument name. The values of an empty part and the prefix past
    the count are NaN: whoever uses them is found out.
    """
    n, h, d = shape
    strides, offsets = strides or {}, offsets or {}
    random = torch.Generator().manual_seed(seed)
    lse_dtype = F64 if dtype == F64 else F32
    values = {name: torch.randn(shape, generator=random, dtype=F64) for name in ROWS[1:]}
    lses = {name: 3 * torch.randn((h, n), generator=random, dtype=F64) + 2 for name in LSES[:2]}
    if empty and h * n >= 4:
        states = [(-INF, INF), (1.5, -INF), (INF, 0.5)]
        for i, state in enumerate(states):  # spread over the rows, the first one always
            row = i * (h * n - 1) // len(states)
            for name, lse in zip(LSES[:2], state, strict=True):
                lses[name].view(-1)[row] = lse
    for part in ("prefix", "suffix"):
        values[f"{part}_output"][lses[f"{part}_lse"].T.isinf()] = NAN
    if count is not None:
        values["suffix_output"][count:] = torch.randn((n - count, h, d), generator=random)
        values["prefix_output"][count:] = NAN
        lses["prefix_lse"][:, count:] = NAN

    def lay(name, tensor):
        return place(tensor, device, strides.get(name), offsets.get(name, 0))

    return Call(
        output=blank(
            shape, output_dtype or dtype, device, strides.get("output"), offsets.get("output", 0)
        ),
        output_lse=blank(
            (h, n), lse_dtype, device, strides.get("output_lse"), offsets.get("output_lse", 0)
        )
        if output_lse
        else None,
        prefill_tokens_with_context=count,
        output_scale=None if scale is None else torch.tensor(scale, dtype=F32, device=device),
        **{name: lay(name, values[name].to(dtype)) for name in ROWS[1:]},
        **{name: lay(name, lses[name].to(lse_dtype)) for name in LSES[:2]},
    )


class Recording(TorchDispatchMode):
    """Keeps the operators that come by in `seen`."""

    def __init__(self):
        super().__init__()
        self.seen = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        self.seen.append(func)
        return func(*args, **(kwargs or {}))


PLAIN_SHAPE = (5, 3, 64)


def plain(device="cpu", **options) -> Call:
    """Small tensors with nothing special about them but what `options` say."""
    return make_call(PLAIN_SHAPE, options.pop("dtype", F32), device, **options)


def expected_kernel(call: Call) -> str:
    """The dispatch rule of the README, written a second time."""
    output, inputs = call.output, (call.prefix_output, call.suffix_output)
    if output.device.type == "cpu":
        return "cpu"
    dtype = inputs[0].dtype
    pack = 16 // dtype.itemsize
    lses = (call.prefix_lse, call.suffix_lse, call.output_lse)
    keeps_rows = output is call.suffix_output and call.output_scale is None
    keeps_lses = call.output_lse is None or call.output_lse is call.suffix_lse
    if call.prefill_tokens_with_context == 0 and keeps_rows and keeps_lses:
        return "generic"  # there is no row to do

    def fits(tensor, alignment):
        steps = [s for s, size in zip(tensor.stride()[:2], tensor.shape, strict=False) if size > 1]
        addresses = [tensor.data_ptr(), *(s * tensor.element_size() for s in steps)]
        return tensor.stride(2) == 1 and all(a % alignment == 0 for a in addresses)

    def reach(tensor):  # of the last element, in elements
        return sum((n - 1) * s for n, s in zip(tensor.shape, tensor.stride(), strict=True))

    vectorized = (
        dtype in (F32, F16, BF16)
        and output.shape[2] % pack == 0
        and output.shape[2] <= 512 * pack
        and all(reach(tensor) < pack << 32 for tensor in (output, *inputs))
        and all(reach(lse) < 1 << 32 for lse in lses if lse is not None)
        and fits(output, pack * output.element_size())
        and all(fits(tensor, 16) for tensor in inputs)
    )
    return "vectorized" if vectorized else "generic"


@contextlib.contextmanager
def refuses(kind: type[Exception], match: str) -> Iterator[None]:
    """As pytest.raises, for a call with operands that cannot be printed.

    Where a test fails, pytest prints the arguments of every frame of the error, and a tensor whose
    memory was freed ends the process there: here the error's frames are left behind.
    """
    said = "nothing was raised"
    fits = False
    try:
        yield
    except Exception as error:
        said = f"{type(error).__name__}: {error}"
        fits = isinstance(error, kind) and re.search(match, str(error)) is not None
    if not fits:
        pytest.fail(f"expected {kind.__name__} with {match!r}, got: {said}", pytrace=False)


def bits(tensor: torch.Tensor) -> torch.Tensor:
    """The bytes of each element as one integer: NaNs and the sign of zero count."""
    return tensor.detach().cpu().contiguous().view(WORDS[tensor.element_size()])


def assert_bits(actual: torch.Tensor, expected: torch.Tensor) -> None:
    assert actual.dtype == expected.dtype
    torch.testing.assert_close(bits(actual), bits(expected), rtol=0, atol=0)


def half_ulp(magnitude: torch.Tensor, dtype) -> torch.Tensor:
    info = torch.finfo(dtype)
    exponent = torch.frexp(magnitude.clamp(min=info.smallest_normal)).exponent - 1
    return torch.ldexp(torch.full_like(magnitude, info.eps / 2), exponent)


def assert_within(actual, expected, bound) -> None:
    """|actual - expected| <= bound; NaN where NaN is due; what is infinite is exactly so."""
    actual = actual.to(F64)
    assert torch.equal(actual.isnan(), expected.isnan())
    finite = expected.isfinite()
    exact = ~finite & ~expected.isnan()
    assert torch.equal(actual[exact], expected[exact])
    excess = (actual - expected).abs()[finite] - bound[finite]
    assert (excess <= 0).all(), f"above the bound by {excess.max().item():.3g}"


def compare(call: Call, output: torch.Tensor, output_lse: torch.Tensor | None) -> None:
    """The one tolerance rule. `call` holds the operands as they were before."""
    call = Call(*(x.cpu() if isinstance(x, torch.Tensor) else x for x in call))
    output, count, scale = output.cpu(), call.prefill_tokens_with_context, call.output_scale
    prefix, suffix = call.prefix_output, call.suffix_output
    expected, expected_lse = merge_attn_states_reference(
        prefix, call.prefix_lse, suffix, call.suffix_lse, count, scale
    )
    lse_p, lse_s = call.prefix_lse.T, call.suffix_lse.T
    past = torch.zeros_like(lse_p, dtype=torch.bool)
    past[output.shape[0] if count is None else count :] = True
    take_suffix = past | (lse_p.isinf() & lse_s.isfinite())
    take_prefix = ~past & lse_s.isinf() & lse_p.isfinite()
    both_empty = ~past & lse_p.isinf() & lse_s.isinf()

    eps = torch.finfo(F64 if prefix.dtype == F64 else F32).eps
    used_p = prefix.to(F64).abs().masked_fill((past | lse_p.isinf())[..., None], 0)
    used_s = suffix.to(F64).abs().masked_fill((~past & lse_s.isinf())[..., None], 0)
    largest = torch.fmax(used_p, used_s)
    if scale is not None:
        largest = largest / scale.to(F64).abs().reshape(())
    largest[~largest.isfinite()] = 0  # what comes of it is exact: NaN, infinite or saturated
    if output.dtype in FP8:
        limit = torch.finfo(output.dtype).max
        raw = (
            torch.zeros_like(past)
            if scale is not None or output.dtype != prefix.dtype
            else (take_suffix | take_prefix)
        )
        expected = torch.where(raw[..., None], expected, expected.clamp(-limit, limit))
    bound = 8 * eps * largest
    bound = bound + half_ulp(expected.abs() + bound, output.dtype)
    assert_within(output, expected, bound)
    assert (bits(output)[both_empty] == 0).all(), "both empty: zeros"
    if output.dtype == prefix.dtype and scale is None:
        assert_bits(output[take_suffix], suffix[take_suffix])
        assert_bits(output[take_prefix], prefix[take_prefix])
    elif scale is None:  # FP8 widened
        for rows, part in ((take_suffix, suffix), (take_prefix, prefix)):
            exact = part[rows].to(F64)
            assert_within(output[rows], exact, torch.zeros_like(exact))

    if output_lse is not None:
        merged = output_lse.cpu().T
        assert_within(merged, expected_lse.T, 4 * eps * expected_lse.T.abs().clamp(min=1))
        assert_bits(merged[take_suffix], lse_s[take_suffix])
        assert_bits(merged[take_prefix], lse_p[take_prefix])


def _memory(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def run_guarded(call: Call, run) -> None:
    """Runs the call; then every byte that is no part of an output is still what it was."""
    memories = {
        x.untyped_storage().data_ptr(): _memory(x)
        for x in call
        if isinstance(x, torch.Tensor) and x.untyped_storage().nbytes()
    }
    before = {at: memory.clone() for at, memory in memories.items()}
    written = {at: torch.zeros_like(memory) for at, memory in memories.items()}
    for tensor in (call.output, call.output_lse):
        if tensor is not None and tensor.numel():
            mask = written[tensor.untyped_storage().data_ptr()]
            size = tensor.element_size()
            mask[: len(mask) // size * size].view(WORDS[size]).as_strided(
                tensor.shape, tensor.stride(), tensor.storage_offset()
            ).fill_(-1)
    run(*call)
    for at, memory in memories.items():
        stray = (memory != before[at]) & (written[at] == 0)
        assert not stray.any(), f"wrote outside the outputs at byte {stray.nonzero()[0].item()}"


def check(call: Call, run=merge_attn_states.merge_attn_states) -> Call:
    """Runs the call, on the kernel that is due, and compares everything with the reference."""
    inputs = cloned(call)
    if call.output.numel():
        assert merge_attn_states.selected_kernel(*call).kernel == expected_kernel(call)
    run_guarded(call, run)
    compare(inputs, call.output, call.output_lse)
    return call


def compiler(variable: str, *names: str) -> str:
    for name in (os.environ.get(variable), *names):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip(f"no compiler: neither {variable} nor {' or '.join(names)} is here")


def compiled(folder: Path, source: str, *files: str) -> ctypes.CDLL:
    """A library of `source` and of files of csrc/, which it includes as `core/...`."""
    csrc = Path(__file__).resolve().parent.parent / "csrc"
    main, library = folder / "main.cpp", folder / "main.so"
    main.write_text(source)
    flags = ["-std=c++20", "-O2", "-ffp-contract=off", "-shared", "-fPIC", f"-I{csrc}"]
    sources = [main, *(csrc / name for name in files)]
    run_command(compiler("CXX", "c++", "g++"), *flags, *sources, "-o", library)
    return ctypes.CDLL(str(library))


def run_command(*command, **environment) -> str:
    ran = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


def resident_bytes() -> int:
    """Of this process."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")
