"""Parts that saw no keys, rows past the count, and every pair of LSE states."""

import itertools
import subprocess
import sys

import pytest
import torch
from support import (
    BF16,
    E4M3,
    F32,
    F64,
    FLOATS,
    FP8,
    INF,
    NAN,
    WORDS,
    assert_bits,
    bits,
    check,
    make_call,
    place,
)

from merge_attn_states import merge_attn_states as merge

HEAD_SIZES = [128, 99]  # vectorized, generic
# What the LSE of a part can be: no keys in both spellings, an upstream error, an ordinary value,
# scores of +-1e5 (a start value of -5e4 is no -inf), and the ends of float32.
STATES = [0.5, -2.0, -INF, INF, NAN, 1e5, -1e5, 1e5 - 1e4, 3e38, -3e38]


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_every_pair_of_states(head_size, dtype, device, entry):
    pairs = torch.tensor(list(itertools.product(STATES, STATES)), dtype=F64)
    call = make_call((len(pairs), 2, head_size), dtype, device, empty=False)
    for lse, values, state in [
        (call.prefix_lse, call.prefix_output, pairs[:, 0]),
        (call.suffix_lse, call.suffix_output, pairs[:, 1]),
    ]:
        lse.copy_(state.expand(2, -1))
        values[state.isinf()] = NAN
    check(call, entry)
    # Said once without the reference: nobody else is hit, and nothing is left as it was.
    upstream_error = pairs.isnan().any(1)
    both_empty = pairs.isinf().all(1)
    output, lse = call.output.cpu(), call.output_lse.cpu()
    assert torch.equal(output.isnan().all(-1).all(-1), upstream_error)
    assert torch.equal(output.isnan().any(-1).any(-1), upstream_error)
    assert torch.equal(lse.isnan().all(0), upstream_error)
    assert (output[both_empty] == 0).all()
    assert (lse[:, both_empty] == -INF).all()


@pytest.mark.parametrize("empty", [-INF, INF])
@pytest.mark.parametrize("garbage", [NAN, INF, -INF, 65504.0])
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_garbage_of_an_empty_part_reaches_nothing(head_size, garbage, empty, device):
    for side in ("prefix", "suffix"):
        call = make_call((17, 3, head_size), BF16, device, empty=False)
        getattr(call, f"{side}_lse").fill_(empty)
        getattr(call, f"{side}_output").fill_(garbage)
        check(call)
        assert call.output.isfinite().all()


def every_pattern(dtype, count) -> torch.Tensor:
    """All bit patterns of a narrow dtype, random ones with many NaNs of a wide one."""
    word = WORDS[dtype.itemsize]
    if dtype.itemsize <= 2:
        return torch.arange(count).to(word).view(dtype)
    patterns = torch.randint(torch.iinfo(word).min, torch.iinfo(word).max, (count,), dtype=word)
    patterns[::2] |= torch.tensor(INF, dtype=dtype).view(word)  # all exponent bits: NaN payloads
    return patterns.view(dtype)


@pytest.mark.parametrize("dtype", [*FLOATS, *FP8], ids=str)
@pytest.mark.parametrize("shape", [(512, 128), (1024, 64)], ids=str)  # 65,536: all of 16 bits
@pytest.mark.parametrize("shift", [0, 1])  # vectorized, generic
def test_the_other_part_is_copied_byte_for_byte(shift, shape, dtype, device):
    patterns = every_pattern(dtype, 65536).reshape(shape[0], 1, shape[1]).to(device)
    for side, other in [("prefix", "suffix"), ("suffix", "prefix")]:
        call = make_call(
            (shape[0], 1, shape[1]), dtype, device, empty=False, offsets={f"{other}_output": shift}
        )
        getattr(call, f"{side}_output").view(WORDS[dtype.itemsize]).copy_(
            patterns.view(WORDS[dtype.itemsize])
        )
        getattr(call, f"{other}_lse").fill_(-INF)
        getattr(call, f"{other}_output").view(WORDS[dtype.itemsize]).fill_(-1)
        merge(*call)
        assert_bits(call.output, patterns)
        assert_bits(call.output_lse, getattr(call, f"{side}_lse"))


@pytest.mark.parametrize("dtype", [F32, BF16, F64, E4M3], ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
def test_past_the_count_the_suffix_is_raw(head_size, dtype, device, entry):
    tokens, count = 40, 19  # inside a tile of every size
    call = make_call((tokens, 2, head_size), dtype, device, count=count)
    word = WORDS[dtype.itemsize]
    patterns = every_pattern(dtype, 21 * 2 * head_size).view(word).reshape(21, 2, head_size)
    call.suffix_output[count:].view(word).copy_(patterns)
    lse = every_pattern(call.suffix_lse.dtype, 42).reshape(2, 21)
    lse[0, :3] = torch.tensor([INF, -INF, -0.0])
    call.suffix_lse[:, count:] = lse.to(device)
    call.prefix_lse[:, count:] = torch.tensor([INF, NAN, 1e30], device=device).repeat(7)
    suffix, suffix_lse = bits(call.suffix_output), bits(call.suffix_lse)
    entry(*call)
    assert torch.equal(bits(call.output)[count:], suffix[count:])
    assert torch.equal(bits(call.output_lse)[:, count:], suffix_lse[:, count:])
    assert call.output[:count].float().isfinite().all()


# The prefix past the count lies in pages that may not be touched: a read ends the process.
UNREAD_SCRIPT = """
import ctypes, mmap, torch
from support import make_call
from merge_attn_states import merge_attn_states
page = mmap.PAGESIZE
libc = ctypes.CDLL(None, use_errno=True)
libc.mprotect.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
for head_size in (128, 99):  # contiguous loop, strided loop (below)
    for count in (0, 8):
        memory = mmap.mmap(-1, 16 * page)
        prefix = torch.frombuffer(memory, dtype=torch.float32)
        stride = page // 4  # a token a page
        step = 1 if head_size == 128 else 2
        view = prefix.as_strided((16, 1, head_size), (stride, 1, step))
        view[:count] = 1.0
        call = make_call((16, 1, head_size), count=count)._replace(prefix_output=view)
        address = prefix.data_ptr() + count * page
        assert libc.mprotect(address, (16 - count) * page, 0) == 0
        merge_attn_states(*call)
        assert libc.mprotect(address, (16 - count) * page, 3) == 0
"""


def test_the_prefix_past_the_count_is_not_read(child_environment):
    subprocess.run([sys.executable, "-c", UNREAD_SCRIPT], env=child_environment, check=True)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("lse", [-1e5, -3e38, -(2.0**14)])  # underflow in float64 too
def test_a_weight_that_underflows_still_multiplies(lse, head_size, dtype, device):
    """Only an empty part is skipped: 0 * inf is NaN, and a finite lse says that inf was meant."""
    for side in ("prefix", "suffix"):
        call = make_call((9, 2, head_size), dtype, device, empty=False)
        getattr(call, f"{side}_lse").fill_(lse)
        getattr(call, f"{side}_output")[4, 1, 7] = INF
        getattr(call, f"{side}_output")[6, 0, 0] = NAN
        check(call)
        hit = torch.zeros_like(call.output, dtype=torch.bool)
        hit[4, 1, 7] = hit[6, 0, 0] = True
        assert torch.equal(call.output.isnan(), hit)


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("difference", [87.0, 87.1, 88.0, 103.0])  # normal and subnormal in float32
def test_the_smallest_weights_are_not_nothing(difference, dtype, device):
    """Infinity times one of them is infinity, not NaN."""
    for side in ("prefix", "suffix"):
        call = make_call((9, 2, 16), dtype, device, empty=False)
        call.prefix_lse.fill_(0), call.suffix_lse.fill_(0)
        getattr(call, f"{side}_lse").fill_(-difference)
        getattr(call, f"{side}_output")[4, 1, 7] = INF
        check(call)
        assert call.output[4, 1, 7] == INF


def test_a_single_row_that_saw_nothing(device, entry):
    """The smallest call there is: both empty, one element, lse in both spellings."""
    for lse_p, lse_s in itertools.product((-INF, INF), repeat=2):
        call = make_call((1, 1, 1), F32, device)
        call.prefix_lse.fill_(lse_p), call.suffix_lse.fill_(lse_s)
        check(call, entry)


def test_an_expanded_empty_prefix(device):
    """A shared prefix of no keys: one row and one lse for all tokens."""
    call = make_call((33, 4, 128), BF16, device, empty=False)
    prefix = place(torch.full((1, 1, 128), NAN, dtype=BF16), device).expand(33, 4, 128)
    lse = place(torch.full((1, 1), -INF), device).expand(4, 33)
    check(call._replace(prefix_output=prefix, prefix_lse=lse))
    assert_bits(call.output, call.suffix_output)
