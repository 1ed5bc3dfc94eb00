"""Whether a provider's answer is right: nobody is timed before."""

from collections.abc import Iterable

import torch

from merge_attn_states.reference import merge_attn_states_reference, saturate

from .operands import Operands
from .timing import Call, Largest

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


def wrong(
    found: Iterable[tuple[torch.Tensor, torch.Tensor, torch.Tensor, float, float]],
    largest: Largest = list,
) -> str:
    """What is wrong, on any rank: NaN, or some of a tensor beside what is due, by rtol and atol."""
    why = ""
    try:
        for whole, some, due, rtol, atol in found:
            if bool((whole.half() if whole.itemsize == 1 else whole).isnan().any()):
                raise AssertionError("NaN in the answer")
            torch.testing.assert_close(some.double(), due, rtol=rtol, atol=atol)
    except AssertionError as error:
        why = " ".join(str(error).split())
    (is_wrong,) = largest([bool(why)])
    return why or "on another rank" * bool(is_wrong)
