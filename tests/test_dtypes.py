"""The dtype table, with everything that it refuses."""

import itertools

import pytest
import torch
from support import BF16, E4M3, E5M2, F16, F32, F64, FP8, WORDS, blank, check, make_call, refusal_of

WIDE = (F32, F16, BF16)


def legal(input_dtype, output_dtype, scaled) -> bool:
    """The dtype table."""
    if input_dtype in FP8:
        return output_dtype == input_dtype or (output_dtype in WIDE and not scaled)
    if output_dtype in FP8:
        return input_dtype in WIDE and scaled
    return output_dtype == input_dtype and not scaled


PAIRS = list(itertools.product((F32, F16, BF16, F64, *FP8), repeat=2))


@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("input_dtype", "output_dtype"), PAIRS, ids=str)
def test_dtype_table(input_dtype, output_dtype, scaled, device, entry):
    call = make_call(
        (5, 2, 64), input_dtype, device, output_dtype=output_dtype, scale=0.5 if scaled else None
    )
    if legal(input_dtype, output_dtype, scaled):
        check(call, entry)
    else:
        converts = {output_dtype in FP8, input_dtype in FP8} == {True, False}
        fits = output_dtype == input_dtype or (converts and F64 not in (input_dtype, output_dtype))
        named = "output_scale" if fits else "output"  # one is missing, or one too many
        with pytest.raises(refusal_of(entry), match=rf"^{named}: expected "):
            entry(*call)
        word = WORDS[output_dtype.itemsize]
        assert (call.output.view(word) == -1).all()


@pytest.mark.parametrize("dtype", [
    torch.int32, torch.bool, torch.complex64, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz,
], ids=str)  # fmt: skip
def test_other_dtypes_are_refused(dtype, device, entry):
    """The fnuz kinds too: their bits mean other numbers."""
    call = make_call((5, 2, 64), F32, device)
    other = [torch.zeros((5, 2, 64), dtype=dtype, device=device) for _ in range(3)]
    with pytest.raises(refusal_of(entry), match=r"^prefix_output: expected float32, .* got "):
        entry(*call._replace(output=other[0], prefix_output=other[1], suffix_output=other[2]))


def test_two_fp8_dtypes_do_not_mix(device, entry):
    call = make_call((5, 2, 64), E4M3, device)
    with pytest.raises(refusal_of(entry), match=r"^suffix_output: expected float8_e4m3fn"):
        entry(*call._replace(suffix_output=blank((5, 2, 64), E5M2, device)))
