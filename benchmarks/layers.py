"""A layer of attention under PyTorch's context parallel, whose ring merges by update_state or not.

Causal, its ranks balanced, from an eager call to its end on the GPU; forward, or backward too.
"""

import timeit
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor.experimental import context_parallel
from torch.nn import functional
from torch.nn.attention import SDPBackend, sdpa_kernel

from merge_attn_states.integrations import context_parallel as ours

from .cases import TRAINING, Case
from .check import wrong
from .providers import failed
from .results import Record
from .timing import Largest, medians, time_host

CALLS = 2  # a round


def measure(case: Case, device: torch.device, rounds: int, largest: Largest) -> Record:
    """One case, on every rank at once; both ways must give the same."""
    trains, shape = case.kind == TRAINING, (1, case.heads, case.tokens, case.head_size)
    make = partial(torch.randn, shape, dtype=case.input_dtype, device=device)
    query, key, value = operands = [make(requires_grad=trains) for _ in range(3)]
    grad = make()

    def call() -> tuple[Tensor, ...]:
        # Each time from its module, where context parallel puts another.
        out = functional.scaled_dot_product_attention(query, key, value, is_causal=True)
        grads = torch.autograd.grad(out, operands, grad) if trains else ()
        if device.type == "cuda":
            torch.cuda.synchronize()
        return out.detach(), *grads

    ways = {"PyTorch": ours.disable, "ours": ours.enable}
    us, refused, who = {}, {}, "PyTorch"
    try:
        mesh = init_device_mesh(device.type, (dist.get_world_size(),))
        whole = torch.zeros(1, 1, 2 * mesh.size(), 1, device=device)  # something that it can shard
        in_ring = context_parallel(mesh, buffers=[whole], buffer_seq_dims=[2])
        with in_ring, sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            due, who = call(), "ours"
            ours.enable()
            both = zip(call(), due, strict=True)
            if why := wrong(((x, x, y.double(), 2e-2, 2e-2) for x, y in both), largest):
                refused[who] = f"wrong: {why}"
            loops = {
                name: timeit.Timer(call, ways[name]).timeit for name in ways if name not in refused
            }
            us = medians(time_host(loops, dict.fromkeys(loops, CALLS), rounds, largest=largest))
    except Exception as error:  # it is experimental, and what others were measured at is worth more
        refused[who] = failed(error)
    ours.disable()
    return case.record() | {"regime": "layers", "us": us, "refused": refused}
