"""What the tests of a running state stand on: states and blocks, and an update that is watched."""

import torch
from states_support import make_states
from support import BF16, F32, F64, INF, Call, blank, run_guarded

from merge_attn_states import update_state


def update(out, lse, block_out, block_lse, **options) -> None:
    """update_state, of which no byte that is no part of the state may be another one behind it."""
    further = [x for x in options.values() if isinstance(x, torch.Tensor)]
    operands = Call(out, block_out, block_lse, *[*further, None, None][:2], lse)
    run_guarded(operands, lambda *_: update_state(out, lse, block_out, block_lse, **options))


def state_and_block(rows, head_size, dtypes=(F32, BF16), device="cpu", **options):
    states = make_states(rows, head_size, 2, dtypes, device, **options)
    return zip(states.outputs, states.lses, strict=True)


def copies(tensors) -> list[torch.Tensor]:
    return [tensor.clone() for tensor in tensors]


def fresh_state(rows, head_size, dtype, device):
    """As a loop begins: no key was seen, and nobody has written the output."""
    lse = torch.full(rows, -INF, dtype=F64 if dtype == F64 else F32, device=device)
    return blank((*rows, head_size), dtype, device), lse
