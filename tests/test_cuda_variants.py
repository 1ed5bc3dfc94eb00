"""Every variant of the vectorized kernels: which one runs, and that it is right in all its edges.

The variant goes by the number of 16-byte packs: up to 196,608 every thread weighs for itself, by
rows, and further ones merge an LSE each; beyond, one thread a row does, by tiles; from 524,288 on
in blocks of 512 threads.
"""

import pytest
import torch
from support import BF16, E4M3, F16, F32, ROWS, Call, assert_bits, bits, blank, check, make_call

from merge_attn_states import merge_attn_states as merge
from merge_attn_states import selected_kernel

# The tokens are no multiple of any tile.
SMALL = (101, 5, 128)
SMALL_ODD = (501, 11, 96)  # rows that no warp holds whole
MIDDLE = (1003, 15, 128)
MIDDLE_ODD = (1001, 15, 192)
LARGE = (5001, 15, 128)
VARIANTS = {
    SMALL: "16 tokens in a block of 288 threads, by rows",
    SMALL_ODD: "21 tokens in a block of 288 threads, by rows",
    (1, 130, 128): "16 heads in a block of 288 threads, by rows",  # decode
    (31, 40, 128): "16 heads in a block of 288 threads, by rows",  # fewer than two tiles of tokens
    (31, 5, 128): "16 tokens in a block of 288 threads, by rows",  # the same, of fewer heads still
    (2001, 11, 16): "128 tokens in a block of 384 threads, by rows",
    (2001, 11, 8): "256 tokens in a block of 512 threads, by rows",  # a pack a row
    (101, 5, 2400): "1 tokens in a block of 352 threads, by rows",  # wider than a block should be
    (31, 5, 4096): "1 tokens in a block of 544 threads, by rows",  # as wide as a block may be
    MIDDLE: "16 tokens in a block of 256 threads, by tiles",
    MIDDLE_ODD: "10 tokens in a block of 256 threads, by tiles",
    (20011, 15, 8): "256 tokens in a block of 256 threads, by tiles",
    (501, 15, 512): "4 tokens in a block of 256 threads, by tiles",
    (6001, 17, 32): "64 tokens in a block of 256 threads, by tiles",
    LARGE: "32 tokens in a block of 512 threads, by tiles",
    (2001, 15, 576): "7 tokens in a block of 512 threads, by tiles",
}
SHAPES = {
    "small": SMALL,
    "small, odd": SMALL_ODD,
    "middle": MIDDLE,
    "middle, odd": MIDDLE_ODD,
    "large": LARGE,
}
SIZES = pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)


def on_gpu(shape, dtype=BF16, **options) -> Call:
    """As make_call, with the values made where they are needed: these are megabytes."""
    call = make_call((shape[0], shape[1], 8), dtype, "cuda", **options)
    wide = shape[2] // 8
    spread = {
        name: getattr(call, name).repeat(1, 1, wide) for name in ("prefix_output", "suffix_output")
    }
    columns = torch.rand(shape[2], device="cuda").to(dtype)
    spread = {name: values * columns for name, values in spread.items()}
    output = torch.full(shape, float("nan"), device="cuda").to(call.output.dtype)
    return call._replace(output=output, **spread)


@pytest.mark.parametrize("shape", VARIANTS, ids=lambda shape: "x".join(map(str, shape)))
@pytest.mark.parametrize("count", [None, 27], ids=["all", "count"])
def test_the_variant_is_the_one_and_right(shape, count, cuda, entry):
    call = on_gpu(shape, count=None if shape[0] == 1 else count)
    assert selected_kernel(*call).variant == VARIANTS[shape]
    check(call, entry)


@pytest.mark.parametrize("dtype", [F32, F16], ids=str)
@SIZES
def test_other_dtypes(shape, dtype, cuda):
    tokens, heads, head_size = shape
    shape_of_dtype = (tokens * 2 // dtype.itemsize, heads, head_size)  # as many packs
    call = check(on_gpu(shape_of_dtype, dtype))
    assert selected_kernel(*call).variant.split()[-2:] == VARIANTS[shape].split()[-2:]
    check(on_gpu(shape_of_dtype, dtype, output_dtype=E4M3, scale=0.37))


@SIZES
def test_an_fp8_output(shape, cuda, entry):
    call = on_gpu(shape, output_dtype=E4M3, scale=0.37)
    assert selected_kernel(*call).variant == VARIANTS[shape]
    check(call, entry)


def test_without_an_output_lse_no_thread_is_there_for_it(cuda):
    call = check(on_gpu(SMALL)._replace(output_lse=None))
    assert selected_kernel(*call).variant == "16 tokens in a block of 256 threads, by rows"


@pytest.mark.parametrize(
    ("shape", "heads_are_contiguous"), [((65540, 1, 4096), False), ((70001, 2, 128), True)]
)
def test_more_tiles_than_a_grid_has_along_its_second_axis(shape, heads_are_contiguous, cuda):
    call = on_gpu(shape, empty=False)
    if heads_are_contiguous:
        lses = ("prefix_lse", "suffix_lse", "output_lse")
        call = call._replace(**{name: getattr(call, name).T.contiguous().T for name in lses})
    merge(*call)
    assert selected_kernel(*call).variant.endswith("by tiles")
    for rows in (slice(0, 60), slice(65530, shape[0])):
        part = Call(*[
            operand[rows] if operand.ndim == 3 else operand[:, rows] for operand in call[:6]
        ])  # fmt: skip
        alone = part._replace(
            output=torch.full_like(part.output, torch.nan),
            output_lse=torch.full_like(part.output_lse, torch.nan),
        )
        merge(*alone)
        assert_bits(alone.output, part.output)
        assert_bits(alone.output_lse, part.output_lse)


@SIZES
def test_one_result_from_every_variant_and_kernel(shape, cuda):
    """A row's bits depend on nothing but the row: here it is cut out of the large call."""
    call = on_gpu(shape)
    merge(*call)
    rows = slice(40, 61)
    alone = Call(
        output=torch.empty_like(call.output[rows]),
        prefix_output=call.prefix_output[rows].clone(),
        prefix_lse=call.prefix_lse[:, rows].clone(),
        suffix_output=call.suffix_output[rows].clone(),
        suffix_lse=call.suffix_lse[:, rows].clone(),
        output_lse=torch.empty_like(call.output_lse[:, rows]),
    )
    shifted = torch.empty(alone.output.numel() + 1, dtype=BF16, device=cuda)[1:]
    for output in (alone.output, shifted.view(alone.output.shape)):  # vectorized, generic
        merge(*alone._replace(output=output))
        assert_bits(output, call.output[rows])
        assert_bits(alone.output_lse, call.output_lse[:, rows])


@SIZES
@pytest.mark.parametrize("side", ["prefix", "suffix"])
@pytest.mark.parametrize("count", [None, 0, 1, 40, 100])
def test_in_place(side, count, shape, cuda):
    """Rows past the count need no block; their LSE does where it goes elsewhere."""
    for output_lse in ("in place", "elsewhere", "none"):
        call = on_gpu(shape, count=count, empty=False)
        other = call._replace(output=call.output.clone(), output_lse=call.output_lse.clone())
        merge(*other)
        lses = {"in place": getattr(call, f"{side}_lse"), "elsewhere": call.output_lse}
        here = call._replace(
            output=getattr(call, f"{side}_output"), output_lse=lses.get(output_lse)
        )
        merge(*here)
        assert_bits(here.output, other.output)
        if output_lse != "none":
            assert_bits(here.output_lse, other.output_lse)


@SIZES
@pytest.mark.parametrize("layout", ["heads first", "padded heads", "LSEs [N, H]"])
def test_other_strides(layout, shape, cuda):
    plain = on_gpu(shape, count=27)
    call = plain
    for name in ("output", "prefix_output", "suffix_output"):
        values = getattr(plain, name)
        if layout == "heads first":
            values = values.transpose(0, 1).contiguous().transpose(0, 1)
        if layout == "padded heads" and name != "output":
            values = torch.cat([values, values], dim=2)[..., : shape[2]]
        call = call._replace(**{name: values})
    if layout == "LSEs [N, H]":
        for name in ("prefix_lse", "suffix_lse", "output_lse"):
            call = call._replace(**{name: getattr(plain, name).T.contiguous().T})
    assert selected_kernel(*call).kernel == "vectorized"
    merge(*plain), merge(*call)
    assert_bits(call.output, plain.output)
    assert_bits(call.output_lse, plain.output_lse)


@SIZES
def test_calls_that_follow_each_other_closely(shape, cuda):
    """Each reads what the one before wrote, and is launched before that one has ended."""
    call = on_gpu(shape, empty=False)
    state, lse = call.prefix_output, call.prefix_lse
    start, start_lse = state.clone(), lse.clone()
    here = call._replace(output=state, output_lse=lse)

    def chain(wait):
        state.copy_(start), lse.copy_(start_lse)
        for _ in range(20):
            merge(*here)
            wait()
        return bits(state), bits(lse)

    alone = chain(torch.cuda.synchronize)
    for _ in range(5):
        together = chain(lambda: None)
        assert all(map(torch.equal, together, alone))


@pytest.mark.parametrize("shape", [SMALL, MIDDLE], ids=["by rows", "by tiles"])
@pytest.mark.parametrize("border", [2**31, 2**32])
def test_past_the_borders_of_32_bits(border, shape, cuda, gigabytes):
    """Offsets count packs: elements past 32 bits are within their reach."""
    token_stride = border // (shape[0] - 10) // 8 * 8
    need = 3 * 2 * shape[0] * token_stride
    if torch.cuda.mem_get_info()[0] < need * 1.05:
        pytest.skip(f"{need >> 30} GiB of GPU memory are not free")
    near = on_gpu(shape, empty=False)
    call = near._replace(output_lse=near.output_lse.clone())
    for name in ROWS:
        memory = torch.empty(shape[0] * token_stride, device=cuda, dtype=BF16)
        rows = memory.as_strided(shape, (token_stride, shape[2], 1))
        call = call._replace(**{name: rows.copy_(getattr(near, name))})
    assert selected_kernel(*call).variant == VARIANTS[shape]
    merge(*near), merge(*call)
    assert_bits(call.output, near.output)
    assert_bits(call.output_lse, near.output_lse)
    assert not torch.isnan(call.output).any()


def test_what_is_out_of_the_reach_of_32_bits_goes_to_the_generic_kernel(cuda, gigabytes):
    head_stride = 2**32
    if torch.cuda.mem_get_info()[0] < 1.05 * 4 * head_stride:
        pytest.skip("16 GiB of GPU memory are not free")
    near = make_call((17, 2, 128), BF16, cuda, empty=False)
    far = blank((2, 17), F32, cuda, strides=(head_stride, 1)).copy_(near.prefix_lse)
    call = near._replace(prefix_lse=far, output=torch.empty_like(near.output))
    assert selected_kernel(*call).kernel == "generic"
    merge(*near), merge(*call)
    assert_bits(call.output, near.output)
