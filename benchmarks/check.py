"""Whether a provider's answer is right: nobody is timed before."""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch

from merge_attn_states.reference import merge_attn_states_reference, saturate

from .operands import Operands
from .timing import Call

SAMPLED_TOKENS = 64


class Bound(NamedTuple):
    """A provider bound to one set of operands."""

    call: Call
    answer: Callable[[], tuple[torch.Tensor, torch.Tensor]]  # after a call: output, output_lse


def check(bound: Bound, operands: Operands) -> str:
    """Run a provider once and say what is wrong with its answer; empty where it is right.

    Outputs start as NaN. Everything is searched for NaN, and tokens from end to end are compared
    with the reference, within what shows a wrong answer, not an imprecise one.
    """
    tokens = operands.output.shape[0]
    places = [i * (tokens - 1) // max(1, SAMPLED_TOKENS - 1) for i in range(SAMPLED_TOKENS)]
    sample = torch.tensor(sorted(set(places)), device=operands.output.device)
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
    read = {id(tensor) for tensor in operands[1:5]}  # in place: an output is one of these
    for written in (operands.output, operands.output_lse):
        if written is not None and id(written) not in read:
            written.fill_(torch.nan)

    bound.call()
    output, output_lse = bound.answer()
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
