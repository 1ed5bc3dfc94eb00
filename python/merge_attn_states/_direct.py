"""How states travel where every GPU of the group can write to the memory of the others.

One kernel a call (csrc/cuda/peers.cuh) over symmetric memory, which torch.distributed maps into
each rank's process.
"""

from __future__ import annotations

import contextlib
import ctypes
import datetime
import hashlib
import logging
import math
import os
import platform
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import TypeVar

import torch
import torch.distributed as dist

from . import _operator
from ._agreement import Gather, failed_before, first_line
from ._library import fast_path
from ._rank_state import Empty
from .states import Base, merge_states

__all__ = ["Direct", "Plainly", "make_direct", "unfit"]

_MOST_RANKS = 16
_MOST_ROW_BYTES = 8192
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_LONGEST_NS = 2**63 - 1
_OFF = ("0", "false", "off", "no")
_LIMIT = datetime.timedelta(minutes=10)
# A call that nobody has checked: output, lse, empty, lse_base, nan_lse, return_lse.
Plainly = Callable[..., tuple[torch.Tensor, torch.Tensor | None] | None]
_Result = TypeVar("_Result")
_log = logging.getLogger(__name__)
_merge_ranks = torch.ops.merge_attn_states.merge_ranks.default
_operator.register(_merge_ranks, "a merge across ranks has no gradient")
_fast_merge, _ = fast_path("merge_ranks")


def make_direct(
    gather: Gather,
    group: dist.ProcessGroup,
    device: torch.device,
    dtype: torch.dtype,
    shape: tuple[int, int, int],
    scatters: bool,
    timeout: datetime.timedelta | None,
) -> Direct | None:
    """Make it where all ranks can; None on all of them where one cannot, and then each says why.

    MERGE_ATTN_STATES_DIRECT=0 on every rank keeps states from travelling so.

    `shape` is of a rank's states: the most tokens, heads, head size.
    """
    ranks = dist.get_world_size(group)
    if device.type != "cuda" or ranks == 1:
        return None
    asked = os.environ.get("MERGE_ATTN_STATES_DIRECT", "").lower() not in _OFF
    why_not = unfit(ranks, dtype, shape)
    wishes = gather([int(asked), int(asked and not why_not), _machine()])
    if not any(is_asked for is_asked, *_ in wishes):
        return None
    if len({machine for *_, machine in wishes}) > 1:
        why_not = "the ranks are on several machines"
    elif not all(wish for _, wish, _ in wishes):
        why_not = why_not or "a rank has MERGE_ATTN_STATES_DIRECT=0"
    else:
        limit = timeout or _limit_of(group, device)
        try:
            return Direct(gather, group, device, dtype, shape, scatters, limit)
        except RuntimeError as error:  # on all ranks: say, no access from one GPU to another
            why_not = first_line(error)
    _log.warning("states travel by collectives: %s", why_not)
    return None


def _limit_of(group: dist.ProcessGroup, device: torch.device) -> datetime.timedelta:
    """The group's own; by a private name, and where that is gone the default of NCCL's groups."""
    limit = None
    with contextlib.suppress(AttributeError, RuntimeError):
        limit = group._get_backend(device).options._timeout
    return limit if isinstance(limit, datetime.timedelta) else _LIMIT


def unfit(ranks: int, dtype: torch.dtype, shape: tuple[int, int, int]) -> str:
    """Why such states cannot travel directly; empty where they can."""
    max_tokens, heads, head_size = shape
    row_bytes = head_size * dtype.itemsize
    if not 2 <= ranks <= _MOST_RANKS:
        return f"2 to {_MOST_RANKS} ranks are direct, not {ranks}"
    if dtype not in _DTYPES:
        return f"float32, float16 and bfloat16 are direct, not {dtype}"
    if row_bytes % 16 or row_bytes > _MOST_ROW_BYTES:
        return f"rows of 16 to {_MOST_ROW_BYTES} bytes, in steps of 16, are direct, not {row_bytes}"
    if max_tokens * heads >= 2**31:
        return f"fewer than 2^31 rows are direct, not {max_tokens * heads}"
    return ""


def _machine() -> int:
    """A number for the machine that this process runs on."""
    boot = Path("/proc/sys/kernel/random/boot_id")
    name = platform.node() + (boot.read_text() if boot.exists() else "")
    return int.from_bytes(hashlib.sha256(name.encode()).digest()[:7], "big")


class Direct:
    """The memory of a group's ranks, and merges through it."""

    def __init__(
        self,
        gather: Gather,
        group: dist.ProcessGroup,
        device: torch.device,
        dtype: torch.dtype,
        shape: tuple[int, int, int],
        scatters: bool,
        limit: datetime.timedelta,
    ) -> None:
        self._gather, self._group = gather, group
        self._device, self._dtype, self._shape = device, dtype, shape
        rank, ranks = dist.get_rank(group), dist.get_world_size(group)
        max_tokens, heads, head_size = shape
        self._merged_heads = heads // ranks if scatters else heads
        rows = max_tokens * self._merged_heads  # that a rank gets merged
        size, numbers, line_rows, read_rows = torch.ops.merge_attn_states.ranks_layout(
            ranks, rows, head_size * dtype.itemsize
        )
        # The fewest tokens that do not go as lines (core/ranks_call.h).
        self.tokens_in_bulk = line_rows // self._merged_heads + 1
        self._tokens_read = -(-read_rows // self._merged_heads)  # the fewest, in output_buffer
        self._handles: list[object] = []  # what keeps the memory mapped
        self._buffer: torch.Tensor | None = None
        self._numbers, self._report = self._together(partial(self._own_memory, numbers))
        # A kernel writes there, and nobody waits for it; PyTorch would take ten times as long.
        report = (ctypes.c_int64 * 4).from_address(self._report.data_ptr())
        self._reports = memoryview(report).cast("B").cast("q")
        self._memory, pointers = self._shared(size)
        multiprocessors = torch.cuda.get_device_properties(device).multi_processor_count
        fewest = min(each for (each,) in gather([multiprocessors]))
        limit_ns = min(1000 * (limit // datetime.timedelta(microseconds=1)), _LONGEST_NS)
        given = [rank, ranks, int(scatters), max_tokens, heads, self._merged_heads, head_size]
        own = [device.index, limit_ns, fewest, self._numbers.data_ptr(), self._report.data_ptr()]
        no_buffers = [0] * ranks
        self._object = torch.tensor([*given, *own, *pointers, *no_buffers])
        self._address = self._object.data_ptr()
        self._together(self._warm_up)

    def __del__(self) -> None:
        """Kernels on any stream may still use the memory."""
        with contextlib.suppress(Exception):  # as the interpreter ends there may be no torch left
            if not torch.cuda.is_current_stream_capturing():
                torch.cuda.synchronize(self._device)

    def _together(self, step: Callable[[], _Result]) -> _Result:
        """What a step gives, which all ranks take, and whose end is waited for.

        Raises
        ------
        RuntimeError
            A rank cannot take it, of which all hear.
        """
        try:
            result, refusal = step(), ""
        except Exception as error:  # whatever it is, the others wait for this rank
            refusal = f"{type(error).__name__}: {error}"
        if not all(there for (there,) in self._gather([int(not refusal)])):
            raise RuntimeError(refusal or "another rank cannot")
        return result

    def _own_memory(self, numbers: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Make this rank's numbers and report; an error where there is no code for its GPU."""
        one = torch.zeros(1, 1, 16, dtype=self._dtype, device=self._device)
        merge_states([one], [torch.zeros(1, 1, device=self._device)])
        return (
            torch.zeros(numbers, dtype=torch.int32, device=self._device),
            torch.zeros(4, dtype=torch.int64).pin_memory(),
        )

    def _shared(self, size: int) -> tuple[torch.Tensor, list[int]]:
        """Zeros that every rank can write to, and where each rank has them; made by all ranks.

        Raises
        ------
        RuntimeError
            A rank has no memory, or no access to that of another.
        """
        memory = self._together(partial(self._zeros, size))
        return memory, self._together(partial(self._mapped, memory))

    def _zeros(self, size: int) -> torch.Tensor:
        from torch.distributed import _symmetric_memory as symmetric

        return symmetric.empty(size, dtype=torch.uint8, device=self._device).zero_()

    def _mapped(self, memory: torch.Tensor) -> list[int]:
        from torch.distributed import _symmetric_memory as symmetric

        handle = symmetric.rendezvous(memory, self._group.group_name)
        if handle is None:
            raise RuntimeError("the group has no symmetric memory")
        pointers = [int(pointer) for pointer in handle.buffer_ptrs]
        if 0 in pointers or pointers[dist.get_rank(self._group)] != memory.data_ptr():
            raise RuntimeError("this PyTorch shares another memory than it was asked to")
        self._handles.append(handle)
        torch.cuda.synchronize(self._device)  # the zeros are there before others write
        return pointers

    def _warm_up(self) -> None:
        """Load the kernels of lines and of bulk."""
        max_tokens, heads, head_size = self._shape
        output = torch.zeros(1, heads, head_size, dtype=self._dtype, device=self._device)
        for num_tokens in {1, min(max_tokens, self.tokens_in_bulk)}:
            self._load_kernel(output.expand(num_tokens, -1, -1))

    def _load_kernel(self, output: torch.Tensor) -> None:
        """A captured call could not; and wait for it, since a first call may be on any stream."""
        lse = torch.zeros(output.shape[:2], device=self._device)
        self.merge(output, lse, None, "e", False, None, None, True)
        torch.cuda.synchronize(self._device)

    def output_buffer(self) -> torch.Tensor:
        """Memory of `shape` that others read where it lies; the first call is made by all ranks."""
        if self._buffer is None:
            if torch.cuda.is_current_stream_capturing():
                raise RuntimeError(
                    "output_buffer: expected a first call before a CUDA graph is captured"
                )
            memory, pointers = self._shared(math.prod(self._shape) * self._dtype.itemsize)
            self._object[-len(pointers) :] = torch.tensor(pointers)
            self._buffer = memory.view(self._dtype).view(self._shape)
            if self._tokens_read <= self._shape[0]:
                self._load_kernel(self._buffer[: self._tokens_read])
        return self._buffer

    def merge_plainly(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        empty: Empty | None,
        lse_base: str,
        nan_lse: str,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None] | None:
        """A call that nobody has checked; None where it is not a plain one, and nothing happened.

        Host time is what it is for: the C++ behind it (csrc/torch/eager_ranks.cpp) looks at sizes.
        """
        if (fast_merge := _fast_merge) is None:
            return None
        is_plain = (
            type(output) is type(lse) is torch.Tensor
            and output.dtype is self._dtype
            and output.layout is torch.strided
            and output.ndim == 3
            and (lse_base == "e" or lse_base == "2")
            and (nan_lse == "visible" or nan_lse == "empty")
            and not self._reports[0]
        )
        is_in_buffer = is_plain and self._is_buffer(output)
        if not is_plain or (is_in_buffer and not output.is_contiguous()):
            return None
        lengths, starts = empty if type(empty) is tuple and len(empty) == 2 else (None, None)
        mask = None if starts is not None else empty
        # With its strides: in an engine, whose caches are full of other things, half of new_empty.
        num_tokens, merged_heads, head_size = output.shape[0], self._merged_heads, self._shape[2]
        strides = merged_heads * head_size, head_size, 1
        merged = output.new_empty_strided((num_tokens, merged_heads, head_size), strides)
        merged_lse = None
        if return_lse:
            merged_lse = lse.new_empty_strided((num_tokens, merged_heads), (merged_heads, 1))
        flags = nan_lse == "empty", lse_base == "2", is_in_buffer
        given = merged, merged_lse, output, lse, mask, lengths, starts, *flags
        return (merged, merged_lse) if fast_merge(*given, self._address) else None

    def _is_buffer(self, output: torch.Tensor) -> bool:
        return self._buffer is not None and output.data_ptr() == self._buffer.data_ptr()

    def merge(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        empty: Empty | None,
        lse_base: Base,
        nan_is_empty: bool,
        out: torch.Tensor | None,
        out_lse: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """The merge of all ranks' states.

        Raises
        ------
        RuntimeError
            A call before this one failed.
        """
        if self._reports[0]:
            raise failed_before(self._failure())
        output = output if output.stride(2) == 1 else output.contiguous()
        mask, lengths, starts = None, None, None
        if isinstance(empty, tuple):
            lengths, starts = (each.contiguous() for each in empty)
        else:
            mask = empty
        # Where a result may lie on an operand, of which a row is merged while others are yet sent.
        operands = [output, lse, mask, lengths, starts]
        fits = out is not None and out.stride(2) == 1 and _is_apart(out, operands)
        merged, merged_lse = out if fits else None, out_lse
        if out_lse is not None and not _is_apart(out_lse, operands):
            merged_lse = None
        if merged is None:
            num_tokens, _, head_size = output.shape
            merged = output.new_empty(num_tokens, self._merged_heads, head_size)
        if merged_lse is None and return_lse:
            merged_lse = lse.new_empty(merged.shape[:2])
        is_in_buffer = self._is_buffer(output) and output.is_contiguous() and not output.is_neg()
        flags = nan_is_empty, lse_base == "2", is_in_buffer
        args = merged, merged_lse, output, lse, mask, lengths, starts, *flags
        if _fast_merge is None or not _fast_merge(*args, self._address):
            _merge_ranks(*args, self._object)
        for result, given in ((merged, out), (merged_lse, out_lse)):
            if result is not None and given is not None and given is not result:
                given.copy_(result.view(given.shape))
        return merged if out is None else out, merged_lse if out_lse is None else out_lse

    def _failure(self) -> str:
        """What the kernel reported that gave up first."""
        kind, peer, theirs = self._reports[:3]
        return {
            1: f"rank {peer} of the group did not come within the time limit",
            2: f"rank {peer} of the group had a call of {theirs & 0xFFFFFFFF} tokens to base "
            f"{'2' if theirs >> 32 & 1 else 'e'} {'in' if theirs >> 33 else 'outside'} the output "
            "buffer, and this rank another",
            3: "another rank of the group gave up",
        }[kind]


def _is_apart(result: torch.Tensor, operands: list[torch.Tensor | None]) -> bool:
    """Whether a result has memory of its own."""
    own = result.untyped_storage().data_ptr()
    return all(one is None or one.untyped_storage().data_ptr() != own for one in operands)
