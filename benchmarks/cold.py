"""Cold and large: the inputs come from DRAM, which binds everybody.

CUDA graph replays that rotate through sets of buffers, together more than twice the L2, everybody
in turn in one process. The limit is the best of the plain kernels over as many bytes: 128 to 1,024
threads, one or two packs a thread, with or without a dependent launch.
"""

from collections.abc import Iterable, Sequence
from functools import partial

import torch

import merge_attn_states

from . import kernels
from .cases import Case
from .operands import make_operands
from .providers import Provider, prepare
from .results import Record
from .timing import Call, buffer_sets, time_cuda


def measure(case: Case, providers: Sequence[Provider], device: torch.device, rounds: int) -> Record:
    """One case: microseconds, by provider."""
    sets = buffer_sets(case.bytes() * 2 // 3, device)  # in place, a part and the output are one
    operands = make_operands(case, sets, device)
    timed, refused = prepare(providers, operands)
    timed |= plain_kernels(case.bytes(), sets, device, case.has_narrow_output)
    us = {name: timing.median for name, timing in time_cuda(timed, rounds).items()}
    kernel = merge_attn_states.selected_kernel(*operands[0])._asdict()
    return case.record() | kernel | {"us": us, "refused": refused}


def plain_kernels(
    moved: int, sets: int, device: torch.device, narrow: bool = False
) -> dict[str, list[Call]]:
    """The plain kernels over as many bytes, to within a pack, the LSEs counted."""
    packs = kernels.packs_moved(moved, narrow)
    buffers = [_buffers(kernels.PACK * packs // part, sets, device) for part in (1, 1, 1 + narrow)]
    return {
        f"plain, {name}": [
            partial(kernels.plain, variant, memory, packs, narrow)
            for memory in zip(*buffers, strict=True)
        ]
        for name, variant in _launchable(kernels.COLD, device)
    }


def plain_many_kernels(
    parts: int, moved: int, sets: int, device: torch.device
) -> dict[str, list[Call]]:
    """The same of those that read so many buffers and write one, to within 512 bytes of each."""
    size = max(1, round(moved / (parts + 1) / 512)) * 512
    read, written = (_buffers(count * size, sets, device) for count in (parts, 1))
    return {
        f"plain, {name}": [
            partial(kernels.plain_many, variant, memory.view(parts, size), output)
            for memory, output in zip(read, written, strict=True)
        ]
        for name, variant in _launchable(kernels.COLD_MANY, device)
    }


def _launchable(
    variants: dict[str, kernels.Variant], device: torch.device
) -> Iterable[tuple[str, kernels.Variant]]:
    has_dependent = torch.cuda.get_device_capability(device)[0] >= 9
    return (named for named in variants.items() if has_dependent or not named[1][2])


def _buffers(size: int, sets: int, device: torch.device) -> list[torch.Tensor]:
    stride = -(-size // 512) * 512  # where an allocation of its own would begin
    memory = torch.empty(sets, stride, dtype=torch.uint8, device=device)
    return list(memory.random_()[:, :size])
