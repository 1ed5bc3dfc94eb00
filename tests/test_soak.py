"""10^5 random legal calls, one after the other: every answer right, and nothing piles up.

SOAK_CALLS is how many there are in all; on a CPU a twentieth of them. On an H100 a tenth of them
took 27 to 49 s, with seven other processes of the suite beside it (2026-11-25). A leak of bytes a
call is found by the million calls of test_fast_path_load.py, here one of kilobytes is.
"""

import gc
import os
import random
import sys
from itertools import pairwise
from typing import NamedTuple

import pytest
import torch
from support import BF16, E4M3, E5M2, F16, F32, F64, cloned, compare, make_call, resident_bytes

from merge_attn_states import merge_attn_states as merge

CALLS = int(os.environ.get("SOAK_CALLS", 100_000))
PARTS = 10  # so that shards share them
WARM_UP = 1000  # calls, until what Python and PyTorch keep of shapes and numbers hardly grows
WINDOWS = 4  # a leak shows in each of them; whatever else the process does in the meantime does not
MEMORY_SLACK = 24 * 2**20  # bytes by which a process may grow: its heap's pieces move
HEAD_SIZES = (1, 7, 8, 16, 48, 64, 80, 96, 100, 128, 192, 256)


def random_call(draw, device):
    """Any legal call: dtypes, shapes, strides, offsets, aliases, counts, empty parts."""
    dtype = draw.choice([BF16, BF16, F16, F32, F64, E4M3, E5M2])
    n, h, d = draw.choice([1, 2, 5, 16, 33, 64]), draw.choice([1, 2, 3, 8]), draw.choice(HEAD_SIZES)
    fp8_output = dtype in (BF16, F16, F32) and draw.random() < 0.2
    scale = draw.choice([0.5, 3.0]) if fp8_output else None
    if dtype in (E4M3, E5M2) and draw.random() < 0.5:
        scale = 2.0
    wide = d + draw.choice([0, 0, 8, 64])
    rows = draw.choice([(h * wide, wide, 1), (wide, n * wide, 1)])
    far = draw.choice([n, n + 3])
    lses = draw.choice([(far, 1), (1, h)])
    names = ("output", "prefix_output", "suffix_output"), ("prefix_lse", "suffix_lse", "output_lse")
    call = make_call(
        (n, h, d),
        dtype,
        device,
        output_dtype=draw.choice([E4M3, E5M2]) if fp8_output else None,
        count=draw.choice([None, None, 0, n // 2, n]),
        scale=scale,
        output_lse=draw.random() < 0.6,
        empty=draw.random() < 0.5,
        strides=dict.fromkeys(names[0], rows) | dict.fromkeys(names[1], lses),
        offsets={name: draw.choice([0, 0, 1, 8]) for name in names[0]},
        seed=draw.getrandbits(32),
    )
    side = draw.choice(["prefix", "suffix", None])
    if side and not fp8_output:
        call = call._replace(output=getattr(call, f"{side}_output"))
        if call.output_lse is not None and draw.random() < 0.5:
            call = call._replace(output_lse=getattr(call, f"{side}_lse"))
    return call


class Held(NamedTuple):
    """What a process holds: bytes of tensors on the device, Python's objects, bytes in all."""

    on_device: int
    python_blocks: int
    resident: int


def held(device):
    gc.collect()
    allocated = torch.cuda.memory_allocated() if device == "cuda" else 0
    return Held(allocated, sys.getallocatedblocks(), resident_bytes())


@pytest.mark.parametrize("part", range(PARTS))
def test_random_calls(part, device):
    window = CALLS // PARTS // WINDOWS // (1 if device == "cuda" else 20)
    draw = random.Random(part)

    def one_call():
        call = random_call(draw, device)
        before = cloned(call)
        merge(*call)
        compare(before, call.output, call.output_lse)

    def run(calls):
        for _ in range(calls):
            one_call()
        return held(device)

    seen = [run(WARM_UP), *(run(window) for _ in range(WINDOWS))]
    start, end = seen[0], seen[-1]
    assert end.on_device == start.on_device
    grown = [after.python_blocks - before.python_blocks for before, after in pairwise(seen)]
    assert min(grown) < window // 2, grown  # a leaked tensor is one and more
    assert end.resident - start.resident < MEMORY_SLACK
    if device == "cuda":
        # A kernel's error comes up here; a launch's own status raises in its call (launch.cu), and
        # what the op library's CUDA runtime holds back is its own: it is linked into it.
        torch.cuda.synchronize()
