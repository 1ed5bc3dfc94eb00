"""On a CPU: the merge beside torch.add(out=) of its dtype, and beside the formula in PyTorch."""

from functools import partial

import torch

import merge_attn_states

from .cases import Case
from .operands import make_operands
from .providers import EAGER, OURS, OURS_OPS, prepare
from .results import Record
from .timing import medians, time_cpu


def measure(case: Case, rounds: int) -> Record:
    """One case: microseconds, by provider; torch.add's are for this case's bytes."""
    device = torch.device("cpu")
    operands = make_operands(case, 1, device)
    timed, refused = prepare((OURS, OURS_OPS, EAGER), operands)
    parts = torch.randn(3, case.tokens, case.heads, case.head_size).to(case.input_dtype)
    calls = {name: one[0] for name, one in timed.items()}
    calls["add"] = partial(torch.add, parts[0], parts[1], out=parts[2])
    us = medians(time_cpu(calls, rounds))
    us["add"] *= case.bytes() / parts.nbytes  # it has no LSEs to move
    kernel = merge_attn_states.selected_kernel(*operands[0])._asdict()
    return case.record() | kernel | {"us": us, "refused": refused}
