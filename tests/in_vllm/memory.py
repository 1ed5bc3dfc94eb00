"""Copies of operands that keep their strides, and who shares memory with whom."""

from __future__ import annotations

import torch

from benchmarks.operands import Operands


def copied(operands: Operands) -> Operands:
    """The same operands in other memory: each storage is copied once, as a whole."""
    memories: dict[int, torch.Tensor] = {}

    def copy(value: object) -> object:
        if not isinstance(value, torch.Tensor):
            return value
        storage = value.untyped_storage()
        if storage.data_ptr() not in memories:
            whole = torch.empty(0, dtype=torch.uint8, device=value.device).set_(storage)
            memories[storage.data_ptr()] = whole.clone()
        made = torch.empty(0, dtype=value.dtype, device=value.device)
        return made.set_(
            memories[storage.data_ptr()].untyped_storage(),
            value.storage_offset(),
            value.shape,
            value.stride(),
        )

    return Operands(*map(copy, operands))  # type: ignore[arg-type]
