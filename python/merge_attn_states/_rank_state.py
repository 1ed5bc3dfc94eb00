"""What a rank brings to a merge across ranks: which tensors are right, which rows are empty."""

from __future__ import annotations

import datetime
from typing import Any

import torch

from ._operator import refuse_derivatives
from ._sharded import are_sharded
from ._states_operators import lse_dtype_of

__all__ = ["DTYPES", "Empty", "RankState", "check_timeout"]

Empty = torch.Tensor | tuple[torch.Tensor, torch.Tensor]
DTYPES = (
    torch.float32,
    torch.float16,
    torch.bfloat16,
    torch.float64,
    torch.float8_e4m3fn,
    torch.float8_e5m2,
)


class RankState:
    """The sizes of an object's calls, and the checks of one."""

    def __init__(
        self,
        max_tokens: int,
        num_heads: int,
        merged_heads: int,
        head_size: int,
        dtype: torch.dtype,
        device: torch.device,
    ) -> None:
        self.max_tokens, self.num_heads, self.head_size = max_tokens, num_heads, head_size
        self.merged_heads, self.dtype, self.device = merged_heads, dtype, device
        self._rows = {
            dtype: torch.arange(max_tokens, dtype=dtype, device=device)
            for dtype in (torch.int32, torch.int64)
        }

    def check(
        self,
        output: torch.Tensor,
        lse: torch.Tensor,
        empty: Empty | None,
        out: torch.Tensor | None,
        out_lse: torch.Tensor | None,
    ) -> None:
        """Raise what is wrong with the tensors of a call, by the argument's name."""
        self._check("output", output, self.dtype, ("num_tokens", self.num_heads, self.head_size))
        num_tokens: int = output.shape[0]
        if num_tokens > self.max_tokens:
            raise ValueError(
                f"output: expected at most max_tokens = {self.max_tokens} tokens, got {num_tokens}"
            )
        lse_dtype, merged = lse_dtype_of(self.dtype), (num_tokens, self.merged_heads)
        self._check("lse", lse, lse_dtype, (num_tokens, self.num_heads))
        named = {"output": output, "lse": lse}
        if out is not None:
            self._check("out", out, self.dtype, (*merged, self.head_size))
            named["out"] = out
        if out_lse is not None:
            self._check("out_lse", out_lse, lse_dtype, merged)
            named["out_lse"] = out_lse
        refuse_derivatives(named.items(), "a merge across ranks has no gradient")
        for name, result in (("out", out), ("out_lse", out_lse)):
            if result is not None and result.is_neg():
                raise ValueError(f"{name}: expected a tensor without the negative bit")
        if empty is not None:
            self._check_empty(empty, num_tokens)
        if out is not None or out_lse is not None:
            self._check_memory(num_tokens, out, out_lse)

    def _check_memory(
        self, num_tokens: int, out: torch.Tensor | None, out_lse: torch.Tensor | None
    ) -> None:
        """Raise what a merge would say of its results, whose parts have memory of their own."""
        shape = (num_tokens, self.merged_heads, self.head_size)
        part = torch.empty(1, dtype=self.dtype, device=self.device).expand(shape)
        lse = torch.empty(1, dtype=lse_dtype_of(self.dtype), device=self.device).expand(shape[:2])
        parts: tuple[Any, ...] = ([part], [lse], [], [], None, None, "e")
        status, said, *_ = torch.ops.merge_attn_states.inspect_merge_states(out, out_lse, *parts)
        if status:
            raise ValueError(said)

    def mask(self, empty: Empty | None, num_tokens: int) -> torch.Tensor | None:
        """Of rows that are empty, [num_tokens, num_heads]."""
        if empty is None or isinstance(empty, torch.Tensor):
            return empty
        lengths, starts = empty
        # Rows before the first request and behind the last one are nobody's.
        without_keys = torch.nn.functional.pad(lengths == 0, (1, 1), value=True)
        rows = self._rows[starts.dtype][:num_tokens]
        of_rows = without_keys[torch.searchsorted(starts.contiguous(), rows, right=True)]
        return of_rows.unsqueeze(1).expand(-1, self.num_heads)

    def _check(
        self, name: str, tensor: Any, dtype: torch.dtype, shape: tuple[int | str, ...]
    ) -> None:
        """Where a name stands for the first size, any will do; an LSE may have a trailing 1."""
        if (  # each call's case first: this is host time
            type(tensor) is torch.Tensor
            and _has_shape(tensor.shape, shape)
            and tensor.dtype is dtype
            and tensor.device == self.device
            and tensor.layout is torch.strided
        ):
            return
        if not isinstance(tensor, torch.Tensor):
            raise TypeError(f"{name}: expected a tensor, got {type(tensor).__name__}")
        if are_sharded([tensor]):
            raise ValueError(f"{name}: expected this rank's own tensor, got a DTensor: to_local()")
        if tensor.dtype != dtype:
            raise ValueError(f"{name}: expected {dtype}, got {tensor.dtype}")
        if tensor.layout != torch.strided or tensor.device != self.device:
            raise ValueError(
                f"{name}: expected a dense tensor on {self.device}, got a {tensor.layout} one on "
                f"{tensor.device}"
            )
        sizes = tensor.shape
        if "lse" in name and sizes[2:] == (1,):
            sizes = sizes[:2]
        if not _has_shape(sizes, shape):
            said = ", ".join(map(str, shape))
            raise ValueError(f"{name}: expected shape [{said}], got {list(tensor.shape)}")

    def _check_empty(self, empty: Any, num_tokens: int) -> None:
        if isinstance(empty, torch.Tensor):
            return self._check("empty", empty, torch.bool, (num_tokens, self.num_heads))
        if not isinstance(empty, tuple) or len(empty) != 2:
            raise TypeError(
                f"empty: expected bools or (lengths, starts), got {type(empty).__name__}"
            )
        lengths, starts = empty
        if not isinstance(starts, torch.Tensor) or starts.dtype not in self._rows:
            got = getattr(starts, "dtype", type(starts).__name__)
            raise ValueError(
                f"empty[1]: expected the starts of requests, int32 or int64, got {got}"
            )
        self._check("empty[0]", lengths, starts.dtype, ("requests",))
        self._check("empty[1]", starts, starts.dtype, (lengths.shape[0] + 1,))


def _has_shape(sizes: tuple[int, ...], shape: tuple[int | str, ...]) -> bool:
    if len(sizes) != len(shape) or sizes[1:] != shape[1:]:
        return False
    return type(shape[0]) is str or sizes[0] == shape[0]


def check_timeout(timeout: Any) -> None:
    if timeout is None:
        return
    if not isinstance(timeout, datetime.timedelta):
        raise TypeError(f"timeout: expected a timedelta, got {type(timeout).__name__}")
    if timeout < datetime.timedelta(milliseconds=1):
        raise ValueError(f"timeout: expected a millisecond or more, got {timeout}")
