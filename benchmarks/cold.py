"""Cold and large: the inputs come from DRAM, which binds everybody.

CUDA graph replays that rotate through sets of buffers, together more than twice the L2, everybody
in turn in one process. The limit is the best of the plain kernels over as many bytes: 128 to 1,024
threads, one or two packs a thread, with or without a dependent launch.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch

import merge_attn_states

from . import kernels
from .cases import Case
from .operands import make_operands
from .providers import Provider, prepare
from .results import Record
from .timing import Call, buffer_sets, medians, time_cuda

Timed = dict[str, list[Call]]  # by provider, a call a set of buffers


def measure(case: Case, providers: Sequence[Provider], device: torch.device, rounds: int) -> Record:
    """One case: microseconds, by provider."""
    sets = buffer_sets(case.bytes() * 2 // 3, device)  # in place, a part and the output are one
    operands = make_operands(case, sets, device)
    timed, refused = prepare(providers, operands)
    timed |= plain_kernels(case.bytes(), sets, device, case.has_narrow_output)
    us = medians(time_cuda(timed, rounds))
    kernel = merge_attn_states.selected_kernel(*operands[0])._asdict()
    return case.record() | kernel | {"us": us, "refused": refused}


def plain_kernels(moved: int, sets: int, device: torch.device, narrow: bool = False) -> Timed:
    """The plain kernels over as many bytes, to within a pack, the LSEs counted."""
    packs = kernels.packs_moved(moved, narrow)
    sizes = [kernels.PACK * packs // part for part in (1, 1, 1 + narrow)]

    def launch(variant: kernels.Variant, *buffers: torch.Tensor) -> None:
        kernels.plain(variant, buffers, packs, narrow)

    return _plain(kernels.COLD, launch, sizes, sets, device)


def plain_many_kernels(parts: int, moved: int, sets: int, device: torch.device) -> Timed:
    """The same of those that read so many buffers and write one, to within 512 bytes of each."""
    size = max(1, round(moved / (parts + 1) / 512)) * 512

    def launch(variant: kernels.Variant, read: torch.Tensor, output: torch.Tensor) -> None:
        kernels.plain_many(variant, read.view(parts, size), output)

    return _plain(kernels.COLD_MANY, launch, [parts * size, size], sets, device)


def _plain(
    variants: dict[str, kernels.Variant],
    launch: Callable[..., None],
    sizes: Sequence[int],
    sets: int,
    device: torch.device,
) -> Timed:
    buffers = [_buffers(size, sets, device) for size in sizes]
    has_dependent = torch.cuda.get_device_capability(device)[0] >= 9
    return {
        f"plain, {name}": [
            partial(launch, variant, *memory) for memory in zip(*buffers, strict=True)
        ]
        for name, variant in variants.items()
        if has_dependent or not variant[2]
    }


def _buffers(size: int, sets: int, device: torch.device) -> list[torch.Tensor]:
    stride = -(-size // 512) * 512  # where an allocation of its own would begin
    memory = torch.empty(sets, stride, dtype=torch.uint8, device=device)
    return list(memory.random_()[:, :size])
