"""A layer of attention under PyTorch's context parallel, whose ring merges by update_state or not.

Causal, its ranks balanced, from an eager call to its end on the GPU; forward, or backward too.
"""

import timeit
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor

from merge_attn_states.integrations import context_parallel as ours

from .cases import TRAINING, Case
from .check import wrong
from .results import Record
from .timing import Largest, medians, time_host

CALLS = 2  # a round


@contextmanager
def in_parallel(device: torch.device) -> Iterator[Callable[..., Tensor]]:
    """Attention whose sequence is sharded over all ranks: it takes a rank's own part of it."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor.experimental import context_parallel
    from torch.nn.attention import SDPBackend, sdpa_kernel

    ranks = dist.get_world_size()
    mesh = init_device_mesh(device.type, (ranks,))
    whole = torch.zeros(1, 1, 2 * ranks, 1, device=device)  # it wants something to shard
    in_ring = context_parallel(mesh, buffers=[whole], buffer_seq_dims=[2])
    with in_ring, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        yield partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)


def measure(case: Case, device: torch.device, rounds: int, largest: Largest) -> Record:
    """One case, on every rank at once; both ways must give the same."""
    trains, shape = case.kind == TRAINING, (1, case.heads, case.tokens, case.head_size)
    make = partial(torch.randn, shape, dtype=case.input_dtype, device=device)
    operands, grad = [make(requires_grad=trains) for _ in range(3)], make()
    with in_parallel(device) as attention:

        def call() -> tuple[Tensor, ...]:
            out = attention(*operands)
            grads = torch.autograd.grad(out, operands, grad) if trains else ()
            if device.type == "cuda":
                torch.cuda.synchronize()
            return out.detach(), *grads

        due = call()
        ours.enable()
        both = zip(call(), due, strict=True)
        found = ((mine, mine, theirs.double(), 2e-2, 2e-2) for mine, theirs in both)
        why = wrong(found, largest)
        ways = {"PyTorch": ours.disable} | ({} if why else {"ours": ours.enable})
        loops = {name: timeit.Timer(call, way).timeit for name, way in ways.items()}
        us = medians(time_host(loops, dict.fromkeys(loops, CALLS), rounds, largest=largest))
        ours.disable()
    refused = {"ours": f"wrong: {why}"} if why else {}
    return case.record() | {"regime": "layers", "us": us, "refused": refused}
