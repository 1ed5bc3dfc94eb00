"""Operands that are DTensors: each rank merges the rows that it has, and nothing is sent.

Rows are independent of one another, so a merge of parts that are sharded alike over tokens, heads
or any other row dimension is a merge of the local shards. What is sharded otherwise is refused.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Sequence
from typing import Any

import torch

__all__ = ["are_sharded", "merge_shards", "update_shards"]

_Named = dict[str, torch.Tensor | None]


def are_sharded(operands: Iterable[Any]) -> bool:
    """Whether any operand is a DTensor; nothing is imported to find out."""
    module = sys.modules.get("torch.distributed.tensor")
    return module is not None and any(isinstance(x, module.DTensor) for x in operands)


class _Shards:
    """How the rows are sharded: as those of `first`, whose parts lie along `dim` if it is given."""

    def __init__(self, name: str, first: Any, dim: int | None = None):
        from torch.distributed.tensor import DTensor, Replicate, Shard

        self.types = DTensor, Replicate, Shard
        if not isinstance(first, DTensor):
            raise TypeError(
                f"{name}: expected a DTensor as others are, got {type(first).__name__}; wrap it by "
                "DTensor.from_local or distribute_tensor"
            )
        self.name, self.mesh, self.placements, self.dim = (
            name,
            first.device_mesh,
            first.placements,
            dim,
        )
        self.num_row_dims = first.dim() - 1
        for placement in self.placements:
            of_rows = isinstance(placement, Shard) and (
                placement.dim < self.num_row_dims and placement.dim != dim
            )
            if not of_rows and not isinstance(placement, Replicate):
                raise ValueError(
                    f"{name}: expected a DTensor that is sharded over rows or replicated, got "
                    f"{placement}; redistribute it"
                )

    def local(self, name: str, operand: Any, placements: Sequence[Any]) -> Any:
        """Return the rank's own rows; None of what is not given."""
        dtensor = self.types[0]
        if operand is None:
            return None
        if not isinstance(operand, dtensor):
            if any(isinstance(placement, self.types[2]) for placement in placements):
                raise TypeError(
                    f"{name}: expected a DTensor as {self.name} is, got {type(operand).__name__}"
                )
            return operand
        if operand.device_mesh != self.mesh or tuple(operand.placements) != tuple(placements):
            raise ValueError(
                f"{name}: expected the placements {tuple(placements)} on the mesh of {self.name}, "
                f"got {tuple(operand.placements)}; redistribute it"
            )
        return operand.to_local()

    def locals(self, named: dict[str, Any]) -> dict[str, Any]:
        return {name: self.local(name, x, self.placements) for name, x in named.items()}

    def of_result(self) -> tuple[Any, ...]:
        """Return the placements of a merged output, which has no dimension of the parts."""
        shard, dim = self.types[2], self.dim
        return tuple(
            shard(p.dim - 1) if dim is not None and isinstance(p, shard) and p.dim > dim else p
            for p in self.placements
        )

    def of_sink(self) -> tuple[Any, ...]:
        """Return the placements of what only the last row dimension has."""
        _, replicate, shard = self.types
        last = self.num_row_dims - 1
        return tuple(
            shard(0) if isinstance(p, shard) and p.dim == last else replicate()
            for p in self.placements
        )

    def whole(self, local: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
        """Return the DTensor of that global shape whose local rows these are."""
        strides = torch.empty(shape, device="meta").stride()
        whole: torch.Tensor = self.types[0].from_local(
            local,
            self.mesh,
            self.of_result(),
            run_check=False,
            shape=torch.Size(shape),
            stride=strides,
        )
        return whole


def merge_shards(
    merge: Callable[..., tuple[torch.Tensor, torch.Tensor | None]],
    outputs: list[torch.Tensor],
    lses: list[torch.Tensor],
    *,
    dim: int | None,
    index: Sequence[torch.Tensor | None] | None,
    empty: Sequence[torch.Tensor | None] | None,
    sink: torch.Tensor | None,
    out: torch.Tensor | None,
    out_lse: torch.Tensor | None,
    **options: Any,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge each rank's own rows by `merge`, which is merge_states."""
    if index is not None:
        raise ValueError(
            "index: expected none for DTensors, since a row's part may be on another rank, got a "
            "list; merge local tensors"
        )
    shards = _Shards("outputs[0]" if dim is None else "outputs", outputs[0], dim)
    lists: dict[str, Any] = {}
    for name, operands in (("outputs", outputs), ("lses", lses), ("empty", empty)):
        if operands is None:
            lists[name] = None
            continue
        named = {f"{name}[{k}]": operand for k, operand in enumerate(operands)}
        lists[name] = list(shards.locals(named).values())
    results = {"out": out, "out_lse": out_lse}
    given = {name: shards.local(name, x, shards.of_result()) for name, x in results.items()}
    if dim is not None:
        lists |= {name: lists[name][0] for name in ("outputs", "lses")}
    new, new_lse = merge(
        dim=dim, sink=shards.local("sink", sink, shards.of_sink()), **lists, **given, **options
    )
    shape = [size for i, size in enumerate(outputs[0].shape) if i != dim]
    out = shards.whole(new, shape) if out is None else out
    if new_lse is not None and out_lse is None:
        out_lse = shards.whole(new_lse, shape[:-1])
    return out, out_lse


def update_shards(
    update: Callable[..., None],
    operands: dict[str, torch.Tensor],
    index: torch.Tensor | None,
    empty: torch.Tensor | None,
    lse_base: str,
) -> None:
    """Merge each rank's own rows of the block by `update`, which is update_state."""
    if index is not None:
        raise ValueError(
            "index: expected none for DTensors, since a row's state may be on another rank, got a "
            "tensor; update local tensors"
        )
    shards = _Shards("out", operands["out"])
    update(**shards.locals({**operands, "empty": empty}), lse_base=lse_base)
