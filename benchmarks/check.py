"""Whether a provider's answer is right: nobody is timed before."""

from collections.abc import Iterable

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
    tolerance = max(2 * torch.finfo(dtype).eps, 1e-5)
    found = [(operands.output, operands.output[sample], expected, tolerance, tolerance)]
    if operands.output_lse is not None:
        lse = operands.output_lse
        found.append((lse, lse[:, sample], expected_lse, 1e-5, 1e-4))
    return wrong(found)


def wrong(found: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]]) -> str:
    """What is wrong with tensors: NaN, or some of it beside what is due, by rtol and atol."""
    try:
        for whole, some, due, rtol, atol in found:
            if bool((whole.half() if whole.itemsize == 1 else whole).isnan().any()):
                return "NaN in the answer"
            torch.testing.assert_close(some.double(), due, rtol=rtol, atol=atol)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""
