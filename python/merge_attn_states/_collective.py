"""How states travel by torch.distributed's own collectives, over whatever backend the group has.

One exchange of bytes a call: a rank's rows lie before their LSEs, so that both travel together and
every dtype does. What is sent is written by a merge of one part and what has come is merged as a
stack, so that empty rows, NaNs, layouts and rounding are merge_states' own.
"""

from __future__ import annotations

import contextlib
import datetime
import math
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from ._agreement import failed_before, first_line
from ._states_operators import lse_dtype_of
from .states import Base, merge_states

__all__ = ["Collective"]

_ALIGNMENT = 16  # bytes: a kernel's pack
# PyTorch 2.13 gave it another name, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


class _Packed(NamedTuple):
    """The states of so many ranks in one memory, [ranks, bytes]."""

    memory: torch.Tensor
    outputs: torch.Tensor  # [ranks, num_tokens, heads, head_size]
    lses: torch.Tensor  # [ranks, num_tokens, heads]


def _packed(
    ranks: int, shape: tuple[int, int, int], dtype: torch.dtype, device: torch.device
) -> _Packed:
    """New memory for states whose outputs have this shape."""
    num_tokens, heads, head_size = shape
    lse_dtype = lse_dtype_of(dtype)
    begin = _aligned(math.prod(shape) * dtype.itemsize)
    size = _aligned(begin + num_tokens * heads * lse_dtype.itemsize) or _ALIGNMENT
    memory = torch.empty(ranks, size, dtype=torch.uint8, device=device)
    outputs, lses = memory.view(dtype), memory.view(lse_dtype)
    return _Packed(
        memory,
        outputs.as_strided((ranks, *shape), (outputs.stride(0), heads * head_size, head_size, 1)),
        lses.as_strided(
            (ranks, num_tokens, heads), (lses.stride(0), heads, 1), begin // lse_dtype.itemsize
        ),
    )


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


class Collective:
    """Exchanges states and merges them, for ranks that agree about everything."""

    def __init__(
        self, group: dist.ProcessGroup, device: torch.device, timeout: datetime.timedelta | None
    ) -> None:
        self.group, self.device, self.timeout = group, device, timeout
        self.ranks = dist.get_world_size(group)
        self._failure = ""

    def gather(self, numbers: list[int]) -> list[list[int]]:
        """Every rank's numbers, of which all have as many."""
        with self._together():
            mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
            gathered = mine.new_empty(self.ranks * len(numbers))
            self._exchange(_all_gather, gathered, mine)
            rows: list[list[int]] = gathered.view(self.ranks, -1).tolist()
        return rows

    def merge(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        empty: torch.Tensor | None,
        lse_base: Base,
        merged_heads: int,
        out: torch.Tensor | None,
        out_lse: torch.Tensor | None,
        return_lse: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The merge of all ranks' states, of this rank's share of the heads or of all."""
        num_tokens, num_heads, head_size = output.shape
        shape, shares = (num_tokens, merged_heads, head_size), num_heads // merged_heads
        come = _packed(self.ranks, shape, output.dtype, self.device)
        with self._together():
            sent = _packed(shares, shape, output.dtype, self.device)
            merge_states(
                [_by_rank(output, shares)],
                [_by_rank(lse, shares)],
                empty=None if empty is None else [_by_rank(empty, shares)],
                lse_base=lse_base,
                out=sent.outputs,
                out_lse=sent.lses,
            )
            collective = _all_gather if shares < self.ranks else dist.all_to_all_single
            self._exchange(collective, come.memory.view(-1), sent.memory.view(-1))
        return merge_states(
            come.outputs,
            come.lses,
            dim=0,
            lse_base=lse_base,
            out=out,
            out_lse=out_lse,
            return_lse=return_lse,
        )

    @contextlib.contextmanager
    def _together(self) -> Iterator[None]:
        """Whatever leaves it early, an interrupt too, leaves the other ranks waiting."""
        if self._failure:
            raise failed_before(self._failure)
        try:
            yield
        except BaseException as error:
            self._failure = first_line(error)
            raise

    def _exchange(
        self, collective: Callable[..., Any], come: torch.Tensor, sent: torch.Tensor
    ) -> None:
        """On a CPU until it is done; on a GPU the stream waits, and the group's watchdog rules."""
        try:
            if self.device.type != "cpu":
                collective(come, sent, group=self.group)
                return
            work = collective(come, sent, group=self.group, async_op=True)
            work.wait() if self.timeout is None else work.wait(self.timeout)
        except RuntimeError as error:
            raise RuntimeError(
                f"the exchange with the group's other ranks failed: {first_line(error)}"
            ) from error


def _by_rank(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """[num_tokens, num_heads, ...] as [ranks, num_tokens, num_heads / ranks, ...]."""
    of_rank = tensor.shape[1] // ranks
    return tensor.view(len(tensor), ranks, of_rank, *tensor.shape[2:]).movedim(1, 0)
