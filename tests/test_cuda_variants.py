"""Every variant of the vectorized kernel: which one runs, and that it is right in all its edges.

The variant goes by the number of 16-byte packs: up to 0.6 of what a GPU holds at a time (270,336),
up to all of it, up to one and a half times that, up to 40 MB, and beyond.
"""

import pytest
import torch
from support import BF16, E4M3, F16, F32, ROWS, Call, assert_bits, bits, check, make_call

from merge_attn_states import merge_attn_states as merge
from merge_attn_states import selected_kernel

# The tokens are no multiple of any tile, and neither are heads where a tile has several.
TINY = (101, 5, 128)
SMALL = (1001, 5, 128)
ONE_WAVE = (1003, 15, 128)
TWO_PACKS = (1501, 15, 128)
MAY_BE_WARM = (2999, 15, 128)
LARGE = (3999, 15, 128)
VARIANTS = {
    TINY: "8 tokens x 1 heads, 128 threads",
    (1, 130, 128): "1 tokens x 8 heads, 128 threads",  # decode
    (101, 5, 2400): "1 tokens x 1 heads, 320 threads",  # wider than 128 threads
    SMALL: "8 tokens x 1 heads, 128 threads",
    (1001, 5, 64): "16 tokens x 1 heads, 128 threads",
    (501, 11, 96): "8 tokens x 1 heads, 96 threads",
    (2001, 11, 16): "8 tokens x 8 heads, 128 threads",
    (31, 5, 4104): "1 tokens x 1 heads, 512 threads",  # wider than a block
    (141, 5, 4104): "1 tokens x 1 heads, 512 threads",  # the same, as much as takes two packs
    ONE_WAVE: "32 tokens x 1 heads, 512 threads",
    (201, 15, 512): "8 tokens x 1 heads, 512 threads",
    TWO_PACKS: "32 tokens x 1 heads, 256 threads, two packs",
    (2001, 15, 96): "16 tokens x 2 heads, 192 threads, two packs",
    (1001, 15, 192): "8 tokens x 2 heads, 192 threads, two packs",
    (20011, 15, 8): "32 tokens x 16 heads, 512 threads",  # a pack a row: a thread a row
    MAY_BE_WARM: "16 tokens x 1 heads, 256 threads",
    (801, 15, 512): "4 tokens x 1 heads, 256 threads",
    (6001, 17, 32): "16 tokens x 4 heads, 256 threads",
    LARGE: "32 tokens x 1 heads, 512 threads",
    (2001, 15, 512): "8 tokens x 1 heads, 512 threads",
    (13001, 17, 32): "32 tokens x 4 heads, 512 threads",
    (3001, 17, 96): "8 tokens x 4 heads, 384 threads",
    (2001, 15, 576): "4 tokens x 1 heads, 288 threads",
}
SHAPES = {
    "tiny": TINY,
    "small": SMALL,
    "one wave": ONE_WAVE,
    "two packs": TWO_PACKS,
    "two packs, heads": (2001, 15, 96),
    "may be warm": MAY_BE_WARM,
    "large": LARGE,
    "large, heads": (13001, 17, 32),
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
    threads = selected_kernel(*call).variant.partition(", ")[2]
    assert threads == VARIANTS[shape].partition(", ")[2]
    check(on_gpu(shape_of_dtype, dtype, output_dtype=E4M3, scale=0.37))


@pytest.mark.parametrize(
    ("shape", "variant"),
    [
        (SMALL, "16 tokens x 1 heads, 256 threads"),
        (TWO_PACKS, "32 tokens x 1 heads, 512 threads"),
    ],
    ids=["small", "two packs"],
)
def test_an_fp8_output_has_variants_of_its_own(shape, variant, cuda, entry):
    call = on_gpu(shape, output_dtype=E4M3, scale=0.37)
    assert selected_kernel(*call).variant == variant
    check(call, entry)


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
    assert selected_kernel(*here).variant == VARIANTS[shape]

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


@pytest.mark.parametrize("border", [2**31, 2**32])
def test_two_packs_past_the_borders_of_32_bits(border, cuda, gigabytes):
    """All three operands alike, as two packs a thread want them."""
    token_stride = border // 1400 // 8 * 8
    need = 3 * 2 * TWO_PACKS[0] * token_stride
    if torch.cuda.mem_get_info()[0] < need * 1.05:
        pytest.skip(f"{need >> 30} GiB of GPU memory are not free")
    near = on_gpu(TWO_PACKS, empty=False)
    call = near._replace(output_lse=near.output_lse.clone())
    for name in ROWS:
        memory = torch.empty(TWO_PACKS[0] * token_stride, device=cuda, dtype=BF16)
        rows = memory.as_strided(TWO_PACKS, (token_stride, TWO_PACKS[2], 1))
        call = call._replace(**{name: rows.copy_(getattr(near, name))})
    assert selected_kernel(*call).variant == VARIANTS[TWO_PACKS]
    merge(*near), merge(*call)
    assert_bits(call.output, near.output)
    assert_bits(call.output_lse, near.output_lse)
    assert not torch.isnan(call.output).any()
