"""How states travel by torch.distributed's own collectives, over whatever backend the group has.

One exchange of bytes a call: a rank's rows lie before their LSEs, so that both travel together and
every dtype does. What is sent is written by a merge of one part and what has come is merged as a
stack, so that empty rows, NaNs, layouts and rounding are merge_states' own.
"""

from __future__ import annotations

import datetime
import math
from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.distributed as dist

from .states import Base, merge_states

__all__ = ["Collective", "State", "lse_dtype_of"]

_ALIGNMENT = 16  # bytes: a kernel's pack
# PyTorch 2.13 gave it another name, and warns of the old one.
_all_gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor


def lse_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the LSEs beside outputs of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class State(NamedTuple):
    """What a rank brings to a call, or takes from it."""

    output: torch.Tensor  # [num_tokens, heads, head_size]
    lse: torch.Tensor  # [num_tokens, heads]


class _Packed(NamedTuple):
    """The states of so many ranks in one memory, [ranks, bytes]."""

    memory: torch.Tensor
    outputs: torch.Tensor  # [ranks, num_tokens, heads, head_size]
    lses: torch.Tensor  # [ranks, num_tokens, heads]


def _pack(ranks: int, shape: torch.Size, dtype: torch.dtype, device: torch.device) -> _Packed:
    """New memory for states whose outputs have this shape."""
    num_tokens, heads, head_size = shape
    lse_dtype = lse_dtype_of(dtype)
    begin = _aligned(math.prod(shape) * dtype.itemsize)
    size = _aligned(begin + num_tokens * heads * lse_dtype.itemsize)
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
        mine = torch.tensor(numbers, dtype=torch.int64, device=self.device)
        gathered = torch.empty(self.ranks * len(numbers), dtype=torch.int64, device=self.device)
        self._exchange(_all_gather, gathered, mine)
        rows: list[list[int]] = gathered.view(self.ranks, -1).tolist()
        return rows

    def merge(
        self,
        mine: State,
        empty: torch.Tensor | None,
        lse_base: Base,
        scatters: bool,
        out: torch.Tensor | None,
        out_lse: torch.Tensor | None,
    ) -> State:
        """The merge of all ranks' states, or of this rank's share of their heads."""
        outputs, lses = (_by_rank(x, self.ranks if scatters else 1) for x in mine)
        masks = None if empty is None else [_by_rank(empty, outputs.shape[0])]
        sent = _pack(outputs.shape[0], outputs.shape[1:], outputs.dtype, self.device)
        merge_states(
            [outputs], [lses], empty=masks, lse_base=lse_base, out=sent.outputs, out_lse=sent.lses
        )
        come = _pack(self.ranks, outputs.shape[1:], outputs.dtype, self.device)
        collective = dist.all_to_all_single if scatters else _all_gather
        self._exchange(collective, come.memory.view(-1), sent.memory.view(-1))
        output, lse = merge_states(
            come.outputs, come.lses, dim=0, lse_base=lse_base, out=out, out_lse=out_lse
        )
        assert lse is not None  # by default it is wanted
        return State(output, lse)

    def _exchange(
        self, collective: Callable[..., dist.Work], come: torch.Tensor, sent: torch.Tensor
    ) -> None:
        """On a CPU until it is done; on a GPU the stream waits, and the group's watchdog rules."""
        if self._failure:
            raise RuntimeError(
                f"an exchange of this RankMerge failed before ({self._failure}), so that the ranks "
                "no longer agree which call is theirs: make a new group, and a new one of it"
            )
        try:
            work = collective(come, sent, group=self.group, async_op=True)
            if self.timeout is None or self.device.type != "cpu":
                work.wait()
            else:
                work.wait(self.timeout)
        except BaseException as error:  # an interrupt, too, leaves the others waiting
            self._failure = next(iter(str(error).splitlines()), type(error).__name__)
            if isinstance(error, RuntimeError):
                raise RuntimeError(
                    f"the exchange with the group's other ranks failed: {self._failure}"
                ) from error
            raise


def _by_rank(tensor: torch.Tensor, ranks: int) -> torch.Tensor:
    """[num_tokens, num_heads, ...] as [ranks, num_tokens, num_heads / ranks, ...]."""
    of_rank = tensor.shape[1] // ranks
    return tensor.view(len(tensor), ranks, of_rank, *tensor.shape[2:]).movedim(1, 0)
