"""Whether a provider's answer is right: nobody is timed before."""

from functools import partial

import torch

from merge_attn_states.reference import merge_attn_states_reference, saturate

from .operands import Operands
from .timing import Call

SAMPLED_TOKENS = 64


def check(call: Call, operands: Operands) -> str:
    """Call once and say what is wrong with its answer; empty where it is right.

    Outputs start as NaN. Everything is searched for NaN, and tokens from end to end are compared
    with the reference, within what shows a wrong answer, not an imprecise one.
    """
    last = operands.output.shape[0] - 1
    sample = torch.linspace(0, last, SAMPLED_TOKENS, device=operands.output.device)
    sample = sample.long().unique()  # type: ignore[no-untyped-call]
    count = operands.prefill_tokens_with_context
    expected, expected_lse = merge_attn_states_reference(
        *(operands.prefix_output[sample], operands.prefix_lse[:, sample]),
        *(operands.suffix_output[sample], operands.suffix_lse[:, sample]),
        None if count is None else int((sample < count).sum()),
        operands.output_scale,
    )
    dtype = operands.output.dtype
    if dtype.itemsize == 1:
        expected = saturate(expected.contiguous(), dtype).double()
    for written in (operands.output, operands.output_lse):
        if written is not None and not any(written is one for one in operands[1:5]):
            written.fill_(torch.nan)  # in place it is an input

    call()
    output, output_lse = operands.output, operands.output_lse
    if bool(torch.isnan(output if dtype.itemsize > 1 else output.half()).any()):
        return "NaN in the output"
    if output_lse is not None and bool(torch.isnan(output_lse).any()):
        return "NaN in output_lse"
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    try:
        close = partial(torch.testing.assert_close, rtol=tolerance, atol=tolerance)
        close(output[sample].double(), expected)
        if output_lse is not None:
            close(output_lse[:, sample].double(), expected_lse, rtol=1e-5, atol=1e-4)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""
