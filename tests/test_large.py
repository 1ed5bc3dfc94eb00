"""Offsets and counts past the borders of 2^31 and 2^32."""

import pytest
import torch
from support import (
    BF16,
    E4M3,
    LSES,
    ROWS,
    Call,
    assert_bits,
    blank,
    check,
    cloned,
    compare,
    expected_kernel,
    make_call,
)

import merge_attn_states
from merge_attn_states import merge_attn_states as merge


def far_apart(call, name, border, device) -> Call:
    """`name` stored anew: three rows so far apart that the second and third lie past the border."""
    own = getattr(call, name)
    length = 2 * border + 2 * max(own.shape)
    try:
        memory = torch.empty(length, dtype=own.dtype, device=device)
    except (RuntimeError, torch.OutOfMemoryError):
        pytest.skip(f"{length * own.element_size() >> 30} GiB for one operand are not there")
    strides = [border if size == 3 else max(own.shape) for size in own.shape]
    strides[2:] = [1] * (own.dim() - 2)  # the elements of a row lie side by side
    return call._replace(**{name: memory.as_strided(own.shape, strides).copy_(own)})


FAR_APART = {  # the axis of three is the one that is far apart
    "vectorized": ((3, 1, 64), {}),
    "generic, rows wider than a block": ((3, 1, 8192), {}),
    "tokens first": ((2, 3, 64), {"strides": dict.fromkeys(ROWS, (64, 128, 1))}),
    "FP8 output": ((3, 1, 64), {"output_dtype": E4M3, "scale": 0.5}),
}


# On a CPU the untouched pages between the rows cost address space alone.
@pytest.mark.parametrize("name", [*ROWS, *LSES])
@pytest.mark.parametrize("border", [2**31 - 64, 2**31, 2**32])  # below int32, uint32 elements
@pytest.mark.parametrize("variant", FAR_APART)
def test_rows_past_the_borders_of_32_bits(variant, border, name, device, gigabytes):
    shape, options = FAR_APART[variant]
    near = make_call(shape, BF16, device, empty=False, **options)
    call = far_apart(near, name, border // 4 if name in LSES else border, device)
    kernel = merge_attn_states.selected_kernel(*call).kernel
    assert kernel == expected_kernel(call)
    assert device == "cpu" or kernel == ("generic" if "generic" in variant else "vectorized")
    dense = check(cloned(near))  # with outputs of its own, which `call` does not share
    merge(*call)
    assert_bits(call.output, dense.output)
    assert_bits(call.output_lse, dense.output_lse)


# 2^31 and 2^32 elements and a little more; the odd head size runs the generic kernel.
@pytest.mark.parametrize("head_size", [128, 127])
@pytest.mark.parametrize("border", [2**31, 2**32])
def test_more_elements_than_32_bits_count(border, head_size, cuda, gigabytes):
    heads = 16
    tokens = border // (heads * head_size) + 17
    need = 3 * 2 * tokens * heads * head_size + 3 * 4 * tokens * heads
    if torch.cuda.mem_get_info()[0] < need * 1.05:
        pytest.skip(f"{need >> 30} GiB of GPU memory are not free")
    shape, empty = (tokens, heads, head_size), {"device": cuda, "dtype": BF16}
    call = Call(
        output=torch.full(shape, float("nan"), **empty),
        prefix_output=torch.empty(shape, **empty).normal_(),
        prefix_lse=torch.empty((heads, tokens), device=cuda).normal_(),
        suffix_output=torch.empty(shape, **empty).normal_(),
        suffix_lse=torch.empty((heads, tokens), device=cuda).normal_(),
        output_lse=torch.full((heads, tokens), float("nan"), device=cuda),
        prefill_tokens_with_context=tokens - 3,
    )
    merge(*call)
    around = border // (heads * head_size)
    for first in (0, around // 2 - 2, around - 5, tokens - 20):  # rows on both sides
        rows = slice(first, first + 20)
        part = make_call((20, heads, head_size), BF16, cuda)
        count = min(max(tokens - 3 - first, 0), 20)
        part = part._replace(
            prefix_output=call.prefix_output[rows], suffix_output=call.suffix_output[rows],
            prefix_lse=call.prefix_lse[:, rows], suffix_lse=call.suffix_lse[:, rows],
            prefill_tokens_with_context=count,
        )  # fmt: skip
        inputs = part._replace(output=blank((20, heads, head_size), BF16, cuda))
        compare(inputs, call.output[rows], call.output_lse[:, rows])
    assert not call.output.isnan().any()


@pytest.mark.parametrize("rows", [2**31 - 1, 2**31 + 3])
def test_more_rows_than_31_bits_count(rows, cuda, gigabytes):
    """Without elements a row is its LSE alone; rows past 2^31 are divided in 64 bits."""
    if torch.cuda.mem_get_info()[0] < 4 * rows * 1.6:
        pytest.skip(f"{int(4 * rows * 1.6) >> 30} GiB of GPU memory are not free")
    prefix, suffix = (torch.tensor([[x]], device=cuda).expand(1, rows) for x in (1.5, 0.5))
    values = torch.empty((rows, 1, 0), device=cuda, dtype=BF16)
    output_lse = torch.full((1, rows), float("nan"), device=cuda)
    merge(values, values, prefix, values, suffix, output_lse)
    expected = torch.logaddexp(prefix[0, 0], suffix[0, 0])
    for part in output_lse[0].split(2**28):
        assert ((part - expected).abs() < 1e-6).all()
