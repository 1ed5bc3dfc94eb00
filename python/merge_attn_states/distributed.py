"""A merge across ranks: each has a state of the same queries for its shard of the keys.

This file knows the contract: what a call takes, what ranks must agree about, and which rows are
empty. How states travel is a transport's (_collective.py, _direct.py).
"""

from __future__ import annotations

import datetime
import itertools
from typing import Any, Literal

import torch
import torch.distributed as dist

from ._agreement import agree, caught
from ._collective import Collective
from ._direct import Plainly, make_direct
from ._rank_state import DTYPES, Empty, RankState, check_timeout
from ._states_operators import lse_dtype_of
from .states import Base

__all__ = ["RankMerge"]

_BASES: tuple[Base, ...] = ("e", "2")
_COMPARED = ("max_tokens", "num_heads", "head_size", "dtype", "scatter", "check")
_MEANINGS: dict[str, tuple[Any, ...]] = {
    "dtype": DTYPES,
    "scatter": ("heads", None),
    "check": (False, True),
    "lse_base": _BASES,
}
_objects = itertools.count(1)
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # Dynamo knows it by any name


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
        Before each call compare what ranks must agree about: that it is the same call of the same
        object, its number of tokens, the base. It costs another exchange, and a GPU's stream is
        waited for (so that no CUDA graph can be captured): for finding a mistake. Without it a
        disagreement is undefined, and may be a wrong result or, with gloo, the end of a process.
    timeout : datetime.timedelta, optional
        How long a call on a CPU waits for other ranks, if that is less than the group's own limit,
        up to which the operation itself goes on. None: the group's. On a GPU it is how long a
        direct merge waits, None: the group's; of collectives the group's watchdog rules there.

    Raises
    ------
    TypeError, ValueError
        An argument is wrong, or not the same on every rank; the message names it. Where one rank
        refuses its arguments, all raise.
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
        check_timeout(timeout)
        self.device = torch.empty(0, device=device).device
        self.max_tokens, self.num_heads, self.head_size = max_tokens, num_heads, head_size
        self.dtype, self.scatter, self.check = dtype, scatter, check
        self._transport = Collective(group, self.device, timeout)
        numbers, refusal = caught(self._numbers)
        gather = self._transport.gather
        agree(gather, refusal, numbers or dict.fromkeys(_COMPARED, 0), _MEANINGS)
        # Rank 0 counts its objects; so each has a number that all its ranks know.
        self._number, self._calls = gather([next(_objects)])[0][0], 0
        self.merged_heads = num_heads // self.ranks if scatter else num_heads
        self._rank_state = RankState(
            max_tokens, num_heads, self.merged_heads, head_size, dtype, self.device
        )
        shape = (max_tokens, num_heads, head_size)
        self._direct = make_direct(gather, group, self.device, dtype, shape, bool(scatter), timeout)
        self._merge_plainly: Plainly | None = None
        if self._direct is not None and not check:
            self._merge_plainly = self._direct.merge_plainly
        self._buffer: torch.Tensor | None = None
        if self._direct is None:
            self._warm_up()

    def _warm_up(self) -> None:
        """Make connections and load kernels, which a captured call could not."""
        zeros = torch.zeros(1, self.num_heads, self.head_size, device=self.device)
        output, lse = zeros.to(self.dtype), zeros[..., 0].to(lse_dtype_of(self.dtype))
        self._transport.merge(output, lse, None, "e", self.merged_heads, None, None)

    def _numbers(self) -> dict[str, int]:
        """The arguments, of which all are right, as ranks compare them."""
        for name in ("max_tokens", "num_heads", "head_size"):
            number = getattr(self, name)
            if not isinstance(number, int):
                raise TypeError(f"{name}: expected an int, got {type(number).__name__}")
            if number < 1:
                raise ValueError(f"{name}: expected 1 or more, got {number}")
        if self.dtype not in DTYPES:
            known = ", ".join(map(str, DTYPES))
            raise ValueError(f"dtype: expected one of {known}, got {self.dtype}")
        if self.scatter not in ("heads", None):
            raise ValueError(f"scatter: expected 'heads' or None, got {self.scatter!r}")
        if not isinstance(self.check, bool):
            raise TypeError(f"check: expected a bool, got {type(self.check).__name__}")
        if self.scatter and self.num_heads % self.ranks:
            raise ValueError(
                f"num_heads: expected a multiple of the group's {self.ranks} ranks, "
                f"got {self.num_heads}"
            )
        named = {name: getattr(self, name) for name in _COMPARED}
        return {
            name: _MEANINGS[name].index(value) if name in _MEANINGS else value
            for name, value in named.items()
        }

    @property
    def transport(self) -> str:
        """How states travel: "collective", by the group's own collectives; or "direct"."""
        return "collective" if self._direct is None else "direct"

    def output_buffer(self, num_tokens: int) -> torch.Tensor:
        """Memory for attention to write its output into, so that a direct merge copies nothing.

        The first call is made by all ranks, which map the memory of each other, and not during the
        capture of a CUDA graph.

        Parameters
        ----------
        num_tokens : int
            Up to `max_tokens`.

        Returns
        -------
        torch.Tensor
            [num_tokens, num_heads, head_size], contiguous, the same memory each time: what is to be
            merged next. All ranks pass theirs to a call, or none does.

        Raises
        ------
        ValueError
            num_tokens is negative or more than `max_tokens`.
        RuntimeError
            The first call is made while a CUDA graph is captured.
        """
        if not 0 <= num_tokens <= self.max_tokens:
            raise ValueError(
                f"num_tokens: expected 0 to max_tokens = {self.max_tokens}, got {num_tokens}"
            )
        if self._direct is not None:
            return self._direct.output_buffer()[:num_tokens]
        if self._buffer is None:
            shape = (self.max_tokens, self.num_heads, self.head_size)
            self._buffer = torch.empty(shape, dtype=self.dtype, device=self.device)
        return self._buffer[:num_tokens]

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
        return_lse: bool = True,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Merge this rank's state with those of the others.

        Parameters
        ----------
        output : torch.Tensor
            [num_tokens, num_heads, head_size], this rank's normalised attention output; any
            strides. num_tokens is the same on every rank; for 0 nothing is launched or sent (but
            what `check` compares).
        lse : torch.Tensor
            [num_tokens, num_heads], or that with a trailing 1, and any strides: an LSE [num_heads,
            num_tokens] is `lse.T`. float32 (float64 for float64 outputs). -inf and +inf: this rank
            saw no keys there.
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
            [num_tokens, merged heads] or with a trailing 1, written and returned.
        return_lse : bool
            False: no LSE is computed, and None returned.

        Returns
        -------
        tuple of torch.Tensor
            The merged output and LSE, of this rank's share of the heads (`scatter="heads"`: rank r
            has those from `r * num_heads / ranks` on) or of all.

        Raises
        ------
        TypeError, ValueError
            What is wrong with an argument, by its name, before a state is sent. With `check=True`
            also what ranks disagree about, and that another rank refuses its arguments. Without it
            the others wait for this rank's call, and would take its next one for it.
        RuntimeError
            Another rank did not come within the time limit, or left; or did in a call before, since
            ranks then no longer agree about which call is theirs.
        """
        plainly = self._merge_plainly
        if plainly and out is None and out_lse is None and not _is_dynamo_compiling():
            merged = plainly(output, lse, empty, lse_base, nan_lse, return_lse)
            if merged is not None:
                return merged
        given = output, lse, empty, lse_base, nan_lse, out, out_lse, return_lse
        return self._outside_of_graphs(*given) if _is_dynamo_compiling() else self._call(*given)

    def _call(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        empty: Empty | None,
        lse_base: Base,
        nan_lse: str,
        out: torch.Tensor | None,
        out_lse: torch.Tensor | None,
        return_lse: bool,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        tensors = output, lse, empty, out, out_lse
        if self.check:
            _, refusal = caught(self._check_arguments, lse_base, nan_lse, return_lse, tensors)
            self._agree(0 if refusal else output.shape[0], refusal, lse_base)
        else:
            self._check_arguments(lse_base, nan_lse, return_lse, tensors)
        num_tokens = output.shape[0]
        if num_tokens == 0:
            if out is None:
                out = output.new_empty(0, self.merged_heads, self.head_size)
            if out_lse is None and return_lse:
                out_lse = lse.new_empty(0, self.merged_heads)
            return out, out_lse
        results = out, out_lse, return_lse
        if self._direct is not None:
            return self._direct.merge(output, lse, empty, lse_base, nan_lse == "empty", *results)
        if nan_lse == "empty":
            lse = lse.nan_to_num(nan=-torch.inf, posinf=torch.inf, neginf=-torch.inf)
        mask = self._rank_state.mask(empty, num_tokens)
        lse = lse.view(lse.shape[:2]) if lse.ndim == 3 else lse
        return self._transport.merge(output, lse, mask, lse_base, self.merged_heads, *results)

    # Dynamo would trace half of it, up to the exchange.
    _outside_of_graphs = torch.compiler.disable(_call)  # type: ignore[no-untyped-call]

    def _check_arguments(
        self, lse_base: Base, nan_lse: str, return_lse: bool, tensors: tuple[Any, ...]
    ) -> None:
        """Raise what is wrong with a call's arguments."""
        self._rank_state.check(*tensors)
        if tensors[-1] is not None and not return_lse:
            raise ValueError("out_lse: expected none where return_lse is False, got a tensor")
        if lse_base not in _BASES:
            raise ValueError(f"lse_base: expected 'e' or '2', got {lse_base!r}")
        if nan_lse not in ("visible", "empty"):
            raise ValueError(f"nan_lse: expected 'visible' or 'empty', got {nan_lse!r}")

    def _agree(self, num_tokens: int, refusal: Exception | None, lse_base: Base) -> None:
        if self.device.type == "cuda" and torch.cuda.is_current_stream_capturing():
            raise RuntimeError("check: expected False while a CUDA graph is captured, got True")
        numbers = {
            "object": self._number,
            "call": self._calls,
            "num_tokens": num_tokens,
            "lse_base": 0 if refusal else _BASES.index(lse_base),
        }
        agree(self._transport.gather, refusal, numbers, _MEANINGS)
        self._calls += 1
