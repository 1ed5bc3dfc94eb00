"""In place on either side: an output or its LSE is exactly one of the inputs."""

import pytest
from support import (
    BF16,
    E4M3,
    E5M2,
    F32,
    FLOATS,
    Call,
    check,
    make_call,
    refusal_of,
)

SIDES = ("prefix", "suffix")
HEAD_SIZES = [
    13,  # odd
    48, 80, 96, 192,  # packs that share no power of two with a warp: rows cross warps
    64, 128, 512,  # a part of a warp, half a warp, whole warps
    100,  # no multiple of the 16-bit pack
    576,  # more than one warp a row, no multiple of one
    8200,  # a row longer than a block
]  # fmt: skip


def in_place(call: Call, side: str | None, lse_side: str | None) -> Call:
    if side:
        call = call._replace(output=getattr(call, f"{side}_output"))
    if lse_side:
        call = call._replace(output_lse=getattr(call, f"{lse_side}_lse"))
    return call


@pytest.mark.parametrize("dtype", [*FLOATS, E4M3, E5M2], ids=str)
@pytest.mark.parametrize("head_size", HEAD_SIZES)
@pytest.mark.parametrize("side", SIDES)
def test_in_place(side, head_size, dtype, device):
    tokens = 5 if head_size > 1000 else 35  # two tiles of 16 and a rest
    for lse_side in (None, *SIDES):
        check(
            in_place(
                make_call((tokens, 3, head_size), dtype, device, count=tokens - 2), side, lse_side
            )
        )


@pytest.mark.parametrize("head_size", [48, 96, 128, 100])  # tiles of each kind, generic
@pytest.mark.parametrize("lse_side", SIDES)
def test_lse_in_place_many_blocks(lse_side, head_size, device):
    # Enough rows that a thread that stores an LSE too early meets those that still read it.
    check(in_place(make_call((1025, 8, head_size), BF16, device), None, lse_side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lse_side", SIDES)
def test_in_place_by_every_way_in(lse_side, side, device, entry):
    check(in_place(make_call((17, 3, 96), BF16, device), side, lse_side), entry)


@pytest.mark.parametrize("strides", [(64, 17 * 64, 1), (3 * 192, 192, 1), (384, 128, 2)], ids=str)
@pytest.mark.parametrize("side", SIDES)
def test_in_place_on_a_strided_part(side, strides, device):
    call = make_call(
        (17, 3, 64), BF16, device, strides={f"{side}_output": strides, f"{side}_lse": (1, 3)}
    )
    check(in_place(call, side, side))


def test_all_three_the_same(device):
    call = make_call((17, 3, 64), F32, device, empty=False)
    same, lse = call.prefix_output, call.prefix_lse
    check(call._replace(output=same, suffix_output=same, output_lse=lse, suffix_lse=lse))


def test_in_place_with_an_fp8_scale(device):
    for side in SIDES:
        check(in_place(make_call((17, 3, 64), E4M3, device, scale=0.25), side, side))


@pytest.mark.parametrize("side", SIDES)
def test_a_wider_output_of_fp8_inputs_is_never_in_place(side, device, entry):
    """Its elements lie over several of the input's: other rows would be overwritten unread."""
    call = make_call((6, 4, 64), E4M3, device, output_dtype=F32, empty=False)
    memory = call.output.view(E4M3)  # [6, 4, 256]
    for part in (memory[..., :64], memory[..., 192:], memory.view(24, 256)[:6].view(6, 4, 64)):
        with pytest.raises(
            refusal_of(entry), match=rf"^output: .* in common with {side}_output .* overlap"
        ):
            entry(*call._replace(**{f"{side}_output": part}))
    assert call.output.isnan().all()


@pytest.mark.parametrize("lse_side", SIDES)
def test_lse_in_place_with_a_wider_output(lse_side, device):
    call = make_call((17, 3, 64), E5M2, device, output_dtype=BF16)
    check(in_place(call, None, lse_side))


@pytest.mark.parametrize("side", SIDES)
@pytest.mark.parametrize("lse_side", [None, *SIDES])
@pytest.mark.parametrize("dtype", [F32, BF16, E4M3], ids=str)
def test_in_place_where_every_row_takes_the_suffix(dtype, lse_side, side, device, entry):
    check(in_place(make_call((17, 3, 64), dtype, device, count=0), side, lse_side), entry)
