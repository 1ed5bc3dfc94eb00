"""vLLM's merges across ranks (decode context parallelism), through RankMerge.

`cp_lse_ag_out_rs` and `dcp_a2a_lse_reduce` give a rank its share of the heads, `cp_lse_ag_out_ar`
all of them. Attention backends bind them when they are imported, and layers when they are made.
They stand in `vllm.v1.attention.ops.dcp`, before 0.33 in `.common` and `.dcp_alltoall`. 0.33 has
a workspace of symmetric memory beside them, whose method MLA's layers call.
"""

from __future__ import annotations

import functools
import inspect
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from types import ModuleType
from typing import TYPE_CHECKING, Any, Literal

import torch

from .. import UnavailableError

if TYPE_CHECKING:
    from ..distributed import RankMerge
    from ..states import Base

__all__ = ["HOMES", "RankMerges", "merges_of", "replacing"]

HOMES = tuple(f"vllm.v1.attention.ops.{name}" for name in ("dcp", "common", "dcp_alltoall"))

_Scatter = Literal["heads"] | None
_Merge = Callable[..., Any]
_Empty = tuple[torch.Tensor, torch.Tensor]  # the lengths and starts of requests
_SCATTERS: dict[str, _Scatter] = {
    "cp_lse_ag_out_rs": "heads",
    "dcp_a2a_lse_reduce": "heads",
    "cp_lse_ag_out_ar": None,
    "lse_reduce": "heads",
}
_WORKSPACE, _OF_WORKSPACE = "DirectDCPA2AWorkspace", "lse_reduce"
_REQUESTS = ("seq_lens", "query_start_loc")
_PARAMETERS = (
    *("cp_attn_out", "cp_attn_lse", "cp_group", "ctx", "return_lse", "is_lse_base_on_e"),
    *_REQUESTS,
)
_PARAMETERS_OF_WORKSPACE = (
    *("self", "partial_output", "partial_lse", "is_lse_base_on_e"),
    *_REQUESTS,
)
_FEWEST = 6  # older releases lack the last two
# Of an object, whose memory they are: longer calls, of which the bytes take the time, are made in
# pieces.
_MOST_TOKENS = 512


def merges_of(home: ModuleType) -> Iterator[tuple[ModuleType | type, str, _Merge]]:
    """A module's merges, by who holds them and their names.

    Raises
    ------
    LookupError
        One is called otherwise than is known.
    """
    owners = [home, vars(home)[_WORKSPACE]] if hasattr(home, _WORKSPACE) else [home]
    for owner in owners:
        for name in filter(vars(owner).__contains__, _SCATTERS):
            function = getattr(owner, name)
            given = tuple(inspect.signature(function).parameters)
            known = _PARAMETERS_OF_WORKSPACE if name == _OF_WORKSPACE else _PARAMETERS
            if len(given) < _FEWEST or given != known[: len(given)]:
                at = f"{home.__name__}.{function.__qualname__}"
                raise LookupError(f"{at} is called otherwise: {', '.join(given)}")
            yield owner, name, function


class RankMerges:
    """A process's RankMerge objects, made when a call first needs one.

    Making one is an exchange: ranks make the same calls in the same order, as with vLLM's own
    functions, and so make the same objects at the same calls. One that a CUDA graph was captured
    with is kept, since the graph reads its memory.
    """

    def __init__(self) -> None:
        self._made: dict[tuple[object, ...], RankMerge | ValueError] = {}
        # What takes a plain call of a group's last object, or gives None; None where it has none
        # (RankMerge). An engine has one kind of call, and each costs host time.
        self.plain: dict[tuple[object, _Scatter], Callable[..., Any] | None] = {}
        self._lock = threading.Lock()

    def of(self, group: Any, output: torch.Tensor, scatter: _Scatter) -> RankMerge | None:
        """The object for such calls; None where one would have to be made during a capture.

        Raises
        ------
        ValueError
            There can be none, of which all ranks have heard.
        """
        if output.ndim != 3:
            raise ValueError(f"output: expected three dimensions, got {list(output.shape)}")
        key = (group, *output.shape[1:], output.dtype, output.device, scatter)
        made = self._made.get(key)
        if made is None:
            if output.is_cuda and torch.cuda.is_current_stream_capturing():
                return None
            with self._lock:
                made = self._made.get(key) or self._make(key)
        if isinstance(made, ValueError):
            raise made
        return made

    def _make(self, key: tuple[Any, ...]) -> RankMerge | ValueError:
        from ..distributed import RankMerge  # a second to import, for those alone who merge so

        made: RankMerge | ValueError
        group, num_heads, head_size, dtype, device, scatter = key
        try:
            made = RankMerge(
                group,
                max_tokens=_MOST_TOKENS,
                num_heads=num_heads,
                head_size=head_size,
                dtype=dtype,
                device=device,
                scatter=scatter,
            )
        except ValueError as error:
            made = error
        self._made[key] = made
        if isinstance(made, RankMerge):
            self.plain[group, scatter] = made._merge_plainly
        return made

    @property
    def transports(self) -> list[str]:
        """How states travel, of all objects."""
        made = list(self._made.values())
        return sorted({one.transport for one in made if not isinstance(one, ValueError)})

    def clear(self) -> None:
        """Drop all but direct ones, of which captured CUDA graphs may still read the memory."""
        self.plain.clear()
        for key, made in list(self._made.items()):
            if isinstance(made, ValueError) or made.transport != "direct":
                del self._made[key]


def replacing(
    name: str,
    original: _Merge,
    merges: RankMerges,
    falling_back: Callable[[Exception], AbstractContextManager[None]],
) -> _Merge:
    """Return a merge in the original's place, and with the original behind it.

    The original gets what is refused before a state is sent, for which a call's shapes, dtypes and
    layouts are the reason: all ranks refuse alike. What fails later is raised.
    """
    scatter = _SCATTERS[name]

    def merged(
        by_original: Callable[[], Any],
        group: Any,
        output: torch.Tensor,
        lse: torch.Tensor,
        on_e: bool,
        return_lse: bool,
        requests: tuple[torch.Tensor | None, ...],
        named: dict[str, torch.Tensor | None],
    ) -> Any:
        try:
            base: Base = "e" if on_e else "2"
            empty = _empty(*requests, **named)
            plain = merges.plain.get((group, scatter))
            results = plain and plain(output, lse, empty, base, "empty", return_lse)
            if results is None:
                made = merges.of(group, output, scatter)
                if made is None:
                    return by_original()
                results = _in_pieces(made, output, lse, empty, base, return_lse)
        except (TypeError, ValueError, UnavailableError) as error:
            with falling_back(error):
                return by_original()
        return results if return_lse else results[0]

    def merge(
        cp_attn_out: torch.Tensor,
        cp_attn_lse: torch.Tensor,
        cp_group: Any,
        ctx: object = None,
        return_lse: bool = False,
        is_lse_base_on_e: bool = True,
        *requests: torch.Tensor | None,
        **named: torch.Tensor | None,
    ) -> Any:
        def by_original() -> Any:
            given = (cp_attn_out, cp_attn_lse, cp_group, ctx, return_lse, is_lse_base_on_e)
            return original(*given, *requests, **named)

        if cp_group.world_size == 1:
            return by_original()
        state = cp_attn_out, cp_attn_lse, is_lse_base_on_e
        return merged(by_original, cp_group.device_group, *state, return_lse, requests, named)

    def lse_reduce(
        self: Any,
        partial_output: torch.Tensor,
        partial_lse: torch.Tensor,
        is_lse_base_on_e: bool,
        *requests: torch.Tensor | None,
        **named: torch.Tensor | None,
    ) -> Any:
        state = partial_output, partial_lse, is_lse_base_on_e

        def by_original() -> Any:
            return original(self, *state, *requests, **named)

        return merged(by_original, self.group, *state, False, requests, named)

    return functools.wraps(original)(lse_reduce if name == _OF_WORKSPACE else merge)


def _in_pieces(
    merge: RankMerge,
    output: torch.Tensor,
    lse: torch.Tensor,
    empty: _Empty | None,
    base: Base,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    how: dict[str, Any] = {"lse_base": base, "nan_lse": "empty", "return_lse": return_lse}
    if output.shape[0] <= _MOST_TOKENS:
        return merge(output, lse, empty=empty, **how)
    if lse.shape[:1] != output.shape[:1]:  # before a state is sent
        raise ValueError(f"lse: expected {output.shape[0]} tokens, got shape {list(lse.shape)}")
    out = output.new_empty(output.shape[0], merge.merged_heads, output.shape[2])
    out_lse = lse.new_empty(out.shape[:2]) if return_lse else None
    for begin in range(0, output.shape[0], _MOST_TOKENS):
        rows = slice(begin, begin + _MOST_TOKENS)
        merge(
            output[rows],
            lse[rows],
            empty=None if empty is None else (empty[0], empty[1] - begin),
            out=out[rows],
            out_lse=None if out_lse is None else out_lse[rows],
            **how,
        )
    return out, out_lse


def _empty(
    seq_lens: torch.Tensor | None = None, query_start_loc: torch.Tensor | None = None
) -> _Empty | None:
    """The lengths and starts of requests; both are given or neither, as vLLM has it."""
    if seq_lens is None and query_start_loc is None:
        return None
    if seq_lens is None or query_start_loc is None:
        raise ValueError("seq_lens and query_start_loc: expected both or neither")
    return seq_lens, query_start_loc
