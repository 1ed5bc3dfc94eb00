"""FP8 outputs and inputs."""

import pytest
import torch
from support import (
    BF16,
    E4M3,
    F16,
    F32,
    F64,
    FP8,
    INF,
    NAN,
    WORDS,
    assert_bits,
    check,
    make_call,
)

from merge_attn_states import merge_attn_states as merge
from merge_attn_states.reference import saturate

WIDE = (F32, F16, BF16)


@pytest.mark.parametrize("output_dtype", FP8, ids=str)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("head_size", [
    8,  # one 16-bit pack, two float32 packs
    64, 128, 512,  # models
    96,  # packs that do not divide a warp
    100,  # whole float32 packs, no whole 16-bit ones
    13,  # odd: generic
])  # fmt: skip
def test_fp8_output(head_size, dtype, output_dtype, device, entry):
    for scale in (1.0, 0.0131, 37.5):  # saturates at 0.0131 in e4m3fn
        check(
            make_call(
                (19, 3, head_size), dtype, device, output_dtype=output_dtype, scale=scale, count=16
            ),
            entry,
        )


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("scale", [None, 1.0, 0.3, 5.0])
@pytest.mark.parametrize("head_size", [16, 64, 13])  # an FP8 pack, a model, odd: all generic
def test_fp8_input(head_size, scale, dtype, device, entry):
    check(make_call((19, 3, head_size), dtype, device, scale=scale, count=16), entry)


@pytest.mark.parametrize("output_dtype", WIDE, ids=str)
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("head_size", [
    8,  # half a 16-byte pack of FP8, one of a 16-bit output
    16,  # one pack of FP8
    64,  # a model
    96,  # packs that do not divide a warp
    100,  # whole packs of no input, whole ones of a float32 output
    13,  # odd
])  # fmt: skip
def test_fp8_input_of_a_wider_output(head_size, dtype, output_dtype, device, entry):
    for count in (None, 0, 16):
        check(
            make_call((19, 3, head_size), dtype, device, output_dtype=output_dtype, count=count),
            entry,
        )


@pytest.mark.parametrize("output_dtype", WIDE, ids=str)
@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("side", ["prefix", "suffix"])
def test_a_copied_row_is_widened_exactly(side, dtype, output_dtype, device, entry):
    """Each wider dtype has every number of both formats, inf and NaN among them."""
    codes = torch.arange(256).to(torch.uint8).view(dtype)
    other = "suffix" if side == "prefix" else "prefix"
    call = make_call((2, 1, 256), dtype, device, output_dtype=output_dtype, empty=False)
    getattr(call, f"{side}_output").view(torch.uint8).copy_(codes.view(torch.uint8))
    getattr(call, f"{other}_lse").fill_(-INF)
    entry(*call)
    expected = codes.to(F32).to(output_dtype).expand(2, 1, 256)
    assert_same_numbers(call.output, expected)


@pytest.mark.parametrize(("scale", "output_dtype"), [
    (None, None), (0.7, None), (None, F32), (None, F16), (None, BF16),
], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", FP8, ids=str)
def test_all_pairs_of_codes(dtype, scale, output_dtype, device):
    """256 x 256 codes, NaN and inf among them, with equal and with very different weights."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).to(device)
    call = make_call(
        (256, 3, 256), dtype, device, output_dtype=output_dtype, scale=scale, empty=False
    )
    call.prefix_output.view(torch.uint8).copy_(codes.view(torch.uint8)[:, None, None])
    call.suffix_output.view(torch.uint8).copy_(codes.view(torch.uint8)[None, None, :])
    call.prefix_lse.copy_(torch.tensor([0.0, 3.0, 20.0])[:, None])
    call.suffix_lse.copy_(torch.tensor([0.0, 1.9, 30.0])[:, None])
    check(call)


@pytest.mark.parametrize("dtype", FP8, ids=str)
@pytest.mark.parametrize("side", ["prefix", "suffix"])
def test_a_copied_row_keeps_its_codes_without_a_scale_alone(side, dtype, device):
    """With a scale, 1 too, the row is a number: inf saturates, NaN stays NaN."""
    codes = torch.arange(256).to(torch.uint8).view(dtype).to(device)
    other = "suffix" if side == "prefix" else "prefix"
    for scale in (None, 1.0, 0.5):
        call = make_call((1, 1, 256), dtype, device, scale=scale, empty=False)
        getattr(call, f"{side}_output").view(torch.uint8).copy_(codes.view(torch.uint8))
        getattr(call, f"{other}_lse").fill_(-INF)
        merge(*call)
        if scale is None:
            assert_bits(call.output.view(-1), codes)
        else:
            numbers = codes.cpu().to(F64) / scale
            nan = numbers.isnan()
            output = call.output.view(-1).cpu()
            assert torch.equal(output.to(F32).isnan(), nan)
            assert_bits(output[~nan], saturate(numbers[~nan], dtype))


@pytest.mark.parametrize("output_dtype", FP8, ids=str)
@pytest.mark.parametrize("dtype", [F16, BF16], ids=str)
@pytest.mark.parametrize("shift", [0, 1])  # vectorized, generic
def test_every_16_bit_number_is_rounded_once(shift, dtype, output_dtype, device):
    """All 65,536, ties, subnormals, inf and NaN among them, through a copied row with scale 1."""
    values = torch.arange(65536).to(torch.int16).view(dtype).reshape(512, 1, 128)
    output = copied_row(values, output_dtype, 1.0, shift, device, prefix_lse=INF)
    assert_same_numbers(output, saturate(values.to(F64), output_dtype))


def copied_row(values, output_dtype, scale, shift, device, prefix_lse=-INF):
    """What values become in a suffix whose prefix is empty."""
    call = make_call(
        values.shape,
        values.dtype,
        device,
        output_dtype=output_dtype,
        scale=scale,
        empty=False,
        offsets={"prefix_output": shift},
    )
    word = WORDS[values.dtype.itemsize]
    call.suffix_output.view(word).copy_(values.view(word))
    call.prefix_lse.fill_(prefix_lse)
    merge(*call)
    return call.output


def borders_and_codes(dtype):
    """The numbers halfway between two positive codes, and the codes, the largest last."""
    codes = torch.arange(128, dtype=torch.uint8).view(dtype).to(F32)
    codes = codes[codes.isfinite()]
    return torch.cat([(codes[1:] + codes[:-1]) / 2, codes])


def in_rows(values):
    return torch.nn.functional.pad(values, (0, -len(values) % 64)).reshape(-1, 1, 64)


def assert_same_numbers(actual, expected):
    """Bit for bit but for the payload of a NaN."""
    actual = actual.cpu()
    nan = expected.to(F32).isnan()
    assert torch.equal(actual.to(F32).isnan(), nan)
    assert_bits(actual[~nan], expected[~nan])


@pytest.mark.parametrize("output_dtype", FP8, ids=str)
@pytest.mark.parametrize("shift", [0, 1])  # vectorized, generic
def test_float32_is_rounded_to_nearest_even(shift, output_dtype, device):
    """Each code, each border between two codes, and the float32 numbers on both sides of it."""
    ties = borders_and_codes(output_dtype)
    ties = torch.cat([ties, ties[-1:] * 1.07, ties[-1:] * 99])
    up, down = torch.full_like(ties, INF), torch.full_like(ties, -INF)
    positive = torch.cat([ties, torch.nextafter(ties, up), torch.nextafter(ties, down)])
    special = torch.tensor([INF, -INF, NAN, 3e38, 1e-45, -0.0])
    values = in_rows(torch.cat([positive, -positive, special]))
    output = copied_row(values, output_dtype, 1.0, shift, device)
    assert_same_numbers(output, saturate(values.to(F64), output_dtype))


@pytest.mark.parametrize("output_dtype", FP8, ids=str)
@pytest.mark.parametrize("shift", [0, 1])  # vectorized, generic
@pytest.mark.parametrize("scale", [
    0.37, 3.0, 1.1e-3, 0.99999994, 7.3e9, 2.9e-11,
    0.9 * 2**-60, 1.1 * 2**-60, 0.9 * 2**60, 1.1 * 2**60,  # where the GPU changes its way
    -0.37,
])  # fmt: skip
def test_a_quotient_is_rounded_as_ieee_division_rounds_it(scale, shift, output_dtype, device):
    """Where quotients are the borders between two codes, and five numbers on each side."""
    near = borders_and_codes(output_dtype) * torch.tensor(scale)
    ulps = torch.arange(-5, 6, dtype=torch.int32)
    values = (near.view(torch.int32)[:, None] + ulps).view(F32).flatten()
    values = torch.cat([values[values.isfinite()], torch.tensor([0.0, INF, 3e38, 1e-45])])
    values = in_rows(torch.cat([values, -values, torch.tensor([NAN])]))
    output = copied_row(values, output_dtype, scale, shift, device)
    quotients = values / torch.tensor(scale)
    assert_same_numbers(output, saturate(quotients.to(F64), output_dtype))


@pytest.mark.parametrize("output_dtype", FP8, ids=str)
@pytest.mark.parametrize("dtype", WIDE, ids=str)
@pytest.mark.parametrize("head_size", [64, 13])  # vectorized, generic
def test_saturation_inf_and_nan(head_size, dtype, output_dtype, device):
    limit = torch.finfo(output_dtype).max
    values = torch.tensor([1e4, -1e4, INF, -INF, NAN, 0.0]).to(dtype)
    expected = torch.tensor([limit, -limit, limit, -limit, NAN, 0.0])
    for lse in (-INF, 0.0):  # copied, merged
        call = make_call(
            (6, 2, head_size), dtype, device, output_dtype=output_dtype, scale=1e-2, empty=False
        )
        for part in (call.prefix_output, call.suffix_output):
            part.copy_(values[:, None, None])
        call.prefix_lse.fill_(lse)
        check(call)
        torch.testing.assert_close(
            call.output[:, 0, 0].to(F32).cpu(), expected, rtol=0, atol=0, equal_nan=True
        )


@pytest.mark.parametrize("scale", [
    2e-39,  # subnormal: its reciprocal overflows, the quotient does not
    1e38,  # its reciprocal is subnormal
    -0.5,  # a sign like any other
    0.0,  # x / 0 saturates, 0 / 0 is NaN
    INF,  # everything but inf becomes 0
    NAN,
])  # fmt: skip
@pytest.mark.parametrize("head_size", [64, 13])  # vectorized, generic
def test_any_scale_divides(head_size, scale, device):
    for lse in (-INF, 1.0):  # copied, merged
        call = make_call(
            (7, 2, head_size), F32, device, output_dtype=E4M3, scale=scale, empty=False
        )
        # Quotients around 64 or 1, of normal numbers.
        magnitude = 64 * scale if 0 < scale < 1 else scale if 1 < scale < INF else 1.0
        call.prefix_output.mul_(magnitude), call.suffix_output.mul_(magnitude)
        call.suffix_output[3, 0, :5] = call.prefix_output[3, 0, :5] = 0.0
        call.prefix_lse.fill_(lse)
        check(call)


@pytest.mark.parametrize("shape", [(), (1,), (1, 1), (1, 1, 1, 1, 1)], ids=str)
def test_one_element_of_any_rank_is_a_scale(shape, device, entry):
    call = make_call((4, 2, 64), BF16, device, output_dtype=E4M3, scale=0.5)
    check(call._replace(output_scale=call.output_scale.reshape(shape)), entry)
