"""A merge across ranks: each has a state of the same queries for its shard of the keys.

This file knows the contract: what a call takes, what ranks must agree about, and which rows are
empty. How states travel is a transport's (_collective.py).
"""

from __future__ import annotations

import datetime
from typing import Any, Literal

import torch
import torch.distributed as dist

from ._collective import Collective, State, lse_dtype_of
from .states import Base

__all__ = ["RankMerge"]

Empty = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
_DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)
_BASES: tuple[Base, ...] = ("e", "2")


class RankMerge:
    """Merge the attention states of a process group's ranks, exactly, in one call.

    Where keys are sharded over ranks (decode context parallelism: each rank's KV cache has some of
    the tokens), every rank has an output and a log-sum-exp for every query and head. This exchanges
    and merges them (section 2.2 of arXiv 2501.01005): the result is that of `merge_states` of all
    ranks' states, in the order of the ranks, bit for bit (of a NaN the sign may differ).

    One object serves calls of up to `max_tokens` tokens in any order, and all ranks call it in the
    same order. Operands are ordinary tensors of any strides; they are only read.

    Parameters
    ----------
    group : torch.distributed.ProcessGroup, optional
        Of the ranks. None: the default group.
    max_tokens : int
        The most tokens of a call.
    num_heads : int
        Query heads of the states that ranks bring, the same on every rank.
    head_size : int
        Elements of a row.
    dtype : torch.dtype
        Of outputs: float32, float16, bfloat16, float64, float8_e4m3fn or float8_e5m2.
    device : torch.device or str
        Of this rank's tensors; the group must have a backend for it (gloo on a CPU, NCCL on a GPU).
    scatter : "heads" or None
        "heads": each rank gets its share of the heads merged, `num_heads / ranks` of them. None:
        each gets all, and the same bits.
    check : bool
        Before each call compare what ranks must agree about. It costs another exchange, and a GPU's
        stream is waited for: for finding a mistake. Without it ranks that bring different numbers
        of tokens are undefined (gloo ends the process).
    timeout : datetime.timedelta, optional
        How long a call on a CPU waits for other ranks. None: the group's own limit. On a GPU the
        group's watchdog rules, whatever is given here.

    Raises
    ------
    ValueError
        An argument is wrong, or not the same on every rank; the message names it.
    RuntimeError
        Another rank did not come, or left.

    Examples
    --------
    >>> import torch
    >>> import torch.distributed as dist
    >>> from merge_attn_states.distributed import RankMerge
    >>> dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    >>> merge = RankMerge(
    ...     max_tokens=16, num_heads=8, head_size=64, dtype=torch.float32, device="cpu"
    ... )
    >>> output, lse = merge(torch.randn(4, 8, 64), torch.randn(4, 8))
    >>> output.shape, lse.shape
    (torch.Size([4, 8, 64]), torch.Size([4, 8]))
    >>> dist.destroy_process_group()
    """

    def __init__(
        self,
        group: dist.ProcessGroup | None = None,
        *,
        max_tokens: int,
        num_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device | str,
        scatter: Literal["heads"] | None = "heads",
        check: bool = False,
        timeout: datetime.timedelta | None = None,
    ) -> None:
        group = dist.group.WORLD if group is None else group
        if group is None:
            raise ValueError("group: expected one, or a default group: call init_process_group")
        self.rank, self.ranks = dist.get_rank(group), dist.get_world_size(group)
        if self.rank < 0:
            raise ValueError("group: expected one that this process belongs to")
        for name, number in (
            ("max_tokens", max_tokens),
            ("num_heads", num_heads),
            ("head_size", head_size),
        ):
            if number < 1:
                raise ValueError(f"{name}: expected 1 or more, got {number}")
        if dtype not in _DTYPES:
            raise ValueError(f"dtype: expected one of {', '.join(map(str, _DTYPES))}, got {dtype}")
        if scatter not in ("heads", None):
            raise ValueError(f"scatter: expected 'heads' or None, got {scatter!r}")
        if scatter and num_heads % self.ranks:
            raise ValueError(
                f"num_heads: expected a multiple of the group's {self.ranks} ranks, got {num_heads}"
            )
        self.max_tokens, self.num_heads, self.head_size = max_tokens, num_heads, head_size
        self.dtype, self.device = dtype, torch.empty(0, device=device).device
        self.scatter, self.check = scatter, check
        self.merged_heads = num_heads // self.ranks if scatter else num_heads
        self._calls = 0
        self._transport = Collective(group, self.device, timeout)
        self._agree(
            max_tokens=max_tokens,
            num_heads=num_heads,
            head_size=head_size,
            dtype=_DTYPES.index(dtype),
            scatter=int(scatter is None),
            check=int(check),
        )
        self._rows = {
            dtype: torch.arange(max_tokens, dtype=dtype, device=self.device)
            for dtype in (torch.int32, torch.int64)
        }

    @property
    def transport(self) -> str:
        """How states travel: "collective", by the group's own collectives."""
        return "collective"

    def __call__(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        *,
        empty: Empty | None = None,
        lse_base: Base = "e",
        nan_lse: Literal["visible", "empty"] = "visible",
        out: torch.Tensor | None = None,
        out_lse: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Merge this rank's state with those of the others.

        Parameters
        ----------
        output : torch.Tensor
            [num_tokens, num_heads, head_size], this rank's normalised attention output; any
            strides. num_tokens is the same on every rank; 0 launches nothing.
        lse : torch.Tensor
            [num_tokens, num_heads] and any strides: an LSE [num_heads, num_tokens] is `lse.T`.
            float32 (float64 for float64 outputs). -inf and +inf: this rank saw no keys there.
        empty : torch.Tensor or tuple of two, optional
            Which rows saw no keys here, whatever their LSE says: bools [num_tokens, num_heads]; or
            `(lengths, starts)`, as engines have them on the device, both int32 or both int64.
            Request r has the rows from starts[r] up to starts[r + 1] and lengths[r] keys on this
            rank. Rows of a request without keys are empty, and those that no request has.
        lse_base : "e" or "2"
            To which base LSEs are logarithms, on every rank and in the result.
        nan_lse : "visible" or "empty"
            What a NaN LSE is: an error to be seen, which makes the merged row NaN; or an empty row,
            for kernels that leave NaN where there were no keys.
        out : torch.Tensor, optional
            [num_tokens, merged heads, head_size], written and returned; any strides.
        out_lse : torch.Tensor, optional
            [num_tokens, merged heads], written and returned.

        Returns
        -------
        tuple of torch.Tensor
            The merged output and LSE, of this rank's share of the heads (`scatter="heads"`: rank r
            has those from `r * num_heads / ranks` on) or of all.

        Raises
        ------
        TypeError, ValueError
            What is wrong with an argument, by its name, before anything is sent; or with
            `check=True` what ranks disagree about.
        RuntimeError
            Another rank did not come within the time limit, or left; or did in a call before, since
            ranks then no longer agree about which call is theirs. Or an operand requires grad.
        """
        self._check_operands(output, lse, out, out_lse)
        if lse_base not in _BASES:
            raise ValueError(f"lse_base: expected 'e' or '2', got {lse_base!r}")
        if nan_lse not in ("visible", "empty"):
            raise ValueError(f"nan_lse: expected 'visible' or 'empty', got {nan_lse!r}")
        num_tokens = output.shape[0]
        mask = None if empty is None else self._mask(empty, num_tokens)
        self._calls += 1
        if self.check:
            self._agree(call=self._calls, num_tokens=num_tokens, lse_base=_BASES.index(lse_base))
        if num_tokens == 0:
            return (
                output.new_empty(0, self.merged_heads, self.head_size) if out is None else out,
                lse.new_empty(0, self.merged_heads) if out_lse is None else out_lse,
            )
        if nan_lse == "empty":
            lse = lse.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        return self._transport.merge(
            State(output, lse), mask, lse_base, self.scatter is not None, out, out_lse
        )

    def _check_operands(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        out: torch.Tensor | None,
        out_lse: torch.Tensor | None,
    ) -> None:
        sizes = ("num_tokens", self.num_heads, self.head_size)
        self._check("output", output, self.dtype, sizes)
        num_tokens = output.shape[0]
        if num_tokens > self.max_tokens:
            raise ValueError(
                f"output: expected at most max_tokens = {self.max_tokens} tokens, got {num_tokens}"
            )
        lse_dtype, merged = lse_dtype_of(self.dtype), (num_tokens, self.merged_heads)
        self._check("lse", lse, lse_dtype, (num_tokens, self.num_heads))
        if out is not None:
            self._check("out", out, self.dtype, (*merged, self.head_size))
        if out_lse is not None:
            self._check("out_lse", out_lse, lse_dtype, merged)
        if torch.is_grad_enabled() and (output.requires_grad or lse.requires_grad):
            name = "output" if output.requires_grad else "lse"
            raise RuntimeError(
                f"{name}: expected a tensor that requires no grad, since a merge across ranks has "
                "no gradients; detach it"
            )

    def _check(
        self, name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int | str, ...]
    ) -> None:
        """Where a name stands for a size, any will do."""
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.device != self.device:
            raise ValueError(f"{name}: expected a tensor on {self.device}, got {tensor.device}")
        fits = tensor.ndim == len(shape) and all(
            isinstance(size, str) or size == there
            for size, there in zip(shape, tensor.shape, strict=True)
        )
        if not fits:
            said = ", ".join(map(str, shape))
            raise ValueError(f"{name}: expected shape [{said}], got {list(tensor.shape)}")

    def _mask(self, empty: Empty, num_tokens: int) -> torch.Tensor:
        """Of rows that are empty, [num_tokens, num_heads]."""
        if isinstance(empty, torch.Tensor):
            self._check("empty", empty, torch.bool, (num_tokens, self.num_heads))
            return empty
        if not isinstance(empty, tuple) or len(empty) != 2:
            raise TypeError(
                f"empty: expected bools or (lengths, starts), got {type(empty).__name__}"
            )
        lengths, starts = empty
        if not isinstance(starts, torch.Tensor) or starts.dtype not in self._rows:
            raise TypeError("empty: expected (lengths, starts), both int32 or both int64")
        self._check("empty[0]", lengths, starts.dtype, ("requests",))
        self._check("empty[1]", starts, starts.dtype, (len(lengths) + 1,))
        # Rows before the first request and behind the last one are nobody's.
        without_keys = torch.nn.functional.pad(lengths == 0, (1, 1), value=True)
        rows = self._rows[starts.dtype][:num_tokens]
        of_rows = without_keys[torch.searchsorted(starts, rows, right=True)]
        return of_rows.unsqueeze(1).expand(-1, self.num_heads)

    def _agree(self, **numbers: int) -> None:
        """Raise on every rank where one has another number than the others."""
        of_ranks = self._transport.gather(list(numbers.values()))
        for i, name in enumerate(numbers):
            for rank, there in enumerate(of_ranks):
                if there[i] != of_ranks[0][i]:
                    one, other = (_told(name, x[i]) for x in (of_ranks[0], there))
                    raise ValueError(
                        f"{name}: expected the same on every rank, got {one} on rank 0 and "
                        f"{other} on rank {rank}"
                    )


def _told(name: str, number: int) -> str:
    """A number of _agree as its caller wrote it."""
    known: dict[str, tuple[Any, ...]] = {
        "dtype": _DTYPES,
        "scatter": ("'heads'", None),
        "check": (False, True),
        "lse_base": ("'e'", "'2'"),
    }
    return str(known[name][number] if name in known else number)
