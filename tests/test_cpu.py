"""What the CPU kernel does to large outputs alone: stores past the caches, the same bits."""

import re
from pathlib import Path

import pytest
import torch

from merge_attn_states import merge_attn_states

KERNELS = Path(__file__).parents[1] / "csrc" / "cpu" / "kernels.h"
HEADS, HEAD_SIZE = 32, 128


@pytest.fixture
def tokens():
    """Per dtype: as many as make an output just large enough to be stored past the caches."""
    mebibytes = re.search(r"kStreamedBytes = (\d+) << 20;", KERNELS.read_text())[1]
    return lambda dtype: (int(mebibytes) << 20) // (HEADS * HEAD_SIZE * dtype.itemsize)


def operands(count, dtype):
    outputs = torch.randn(2, count, HEADS, HEAD_SIZE).to(dtype)
    lses = 3 * torch.randn(2, HEADS, count)
    lses[0, :, ::5] = -torch.inf
    lses[1, :, ::7] = torch.inf  # every 35th token: both empty
    lses[0, :, 3] = torch.nan
    return outputs[0], lses[0], outputs[1], lses[1]


def merged(output, *parts, count=None):
    """The merge's bits, by calls of one tile of tokens or less, and by one call for all."""
    output_lse = torch.full_like(parts[1], torch.nan)
    output.fill_(torch.nan)
    merge_attn_states(output, *parts, output_lse, count)
    whole = output.clone(), output_lse.clone()
    output.fill_(torch.nan)
    for begin in range(0, output.shape[0], 16):
        part = slice(begin, begin + 16)
        prefix_output, prefix_lse, suffix_output, suffix_lse = parts
        here = output[part].shape[0]
        merge_attn_states(
            output[part],
            prefix_output[part],
            prefix_lse[:, part],
            suffix_output[part],
            suffix_lse[:, part],
            output_lse[:, part],
            None if count is None else min(max(count - begin, 0), here),
        )
    return whole, (output, output_lse)


def assert_same_bits(whole, pieces):
    for one, other in zip(whole, pieces, strict=True):
        integer = torch.int16 if one.dtype.itemsize == 2 else torch.int32
        assert torch.equal(one.view(integer), other.contiguous().view(integer))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("beyond", [-1, 0, 1], ids=["too small", "just large enough", "ragged"])
def test_large_outputs_keep_their_bits(tokens, dtype, beyond):
    count = tokens(dtype) + beyond
    output = torch.empty(count, HEADS, HEAD_SIZE, dtype=dtype)
    assert_same_bits(*merged(output, *operands(count, dtype), count=count - 40))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    ("shift", "padding"),
    [
        (1, 0),  # no pack of the output is aligned
        (8, 0),  # packs are, lines are not
        (0, 4),  # tokens begin anywhere
        (0, 64),  # whole lines between the tokens
    ],
)
def test_large_outputs_of_any_alignment(tokens, dtype, shift, padding):
    count, row = tokens(dtype), HEADS * HEAD_SIZE
    storage = torch.empty(shift + count * (row + padding) + 64, dtype=dtype)
    first = -storage.data_ptr() // dtype.itemsize % (64 // dtype.itemsize) + shift
    output = storage.as_strided((count, HEADS, HEAD_SIZE), (row + padding, HEAD_SIZE, 1), first)
    assert_same_bits(*merged(output, *operands(count, dtype)))


@pytest.mark.parametrize("side", [0, 2], ids=["prefix", "suffix"])
def test_large_in_place(tokens, side):
    count = tokens(torch.bfloat16)
    parts = operands(count, torch.bfloat16)
    whole, _ = merged(torch.empty_like(parts[0]), *parts)
    merge_attn_states(parts[side], *parts)
    assert_same_bits(whole[:1], [parts[side]])
