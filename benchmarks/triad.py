"""The ceiling on a GPU: the triad of triad.cu over given bytes."""

from __future__ import annotations

import ctypes

import torch

from .native import library

PACK = 16  # bytes that a thread reads of each input


def triad(a: torch.Tensor, b: torch.Tensor, c: torch.Tensor) -> None:
    """Read `a` and `b` and write `c`, CUDA tensors of bytes.

    `c` has as many bytes as each input, or half as many: what a merge with an FP8 output moves.
    """
    narrow = c.numel() < a.numel()
    launch = library("triad").triad_launch
    launch.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64, ctypes.c_int, ctypes.c_void_p]
    packs = a.numel() // PACK
    stream = torch.cuda.current_stream().cuda_stream
    error = launch(a.data_ptr(), b.data_ptr(), c.data_ptr(), packs, narrow, stream)
    if error:
        raise RuntimeError(f"triad: CUDA error {error}")


def triad_buffers(
    moved: int, narrow: bool, sets: int, device: torch.device
) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    """Sets of three buffers over which the triad moves `moved` bytes, to within a pack."""
    packs = max(1, round(moved / (2 * PACK + (PACK // 2 if narrow else PACK))))

    def buffers(size: int) -> torch.Tensor:
        stride = -(-size // 512) * 512  # where an allocation of its own would begin
        memory = torch.empty(sets, stride, dtype=torch.uint8, device=device)
        return memory.random_()[:, :size]

    output = packs * (PACK // 2 if narrow else PACK)
    return list(zip(buffers(packs * PACK), buffers(packs * PACK), buffers(output), strict=True))
