"""PyTorch's context parallel: its ring of attention blocks merges by update_state.

`torch.distributed.tensor.experimental.context_parallel` runs attention block after block and
merges in eager operations, on float32 copies of each block. `enable()` puts one launch a step in
their place, of the block as it is into a float32 state. The class that is replaced is private to
PyTorch; where a release has another one, `enable()` says so and changes nothing.
"""

from __future__ import annotations

import importlib
import inspect
from types import ModuleType
from typing import Any

import torch

from ..states import update_state

__all__ = ["disable", "enable", "is_enabled"]

_MODULE = "torch.distributed.tensor.experimental._context_parallel._attention"
_NAME = "_SDPAMerger"
_METHODS = {
    "__init__": ["self", "convert_to_f32", "seq_dim"],
    "step": ["self", "out", "lse", "partial"],
    "results": ["self"],
}
_DTYPES = (torch.float32, torch.float16, torch.bfloat16)
_theirs: Any = None  # PyTorch's own class, while ours stands in its place


class _Merger:
    """What PyTorch's ring calls: a step for each block, and then the results."""

    def __init__(self, convert_to_f32: bool, seq_dim: int) -> None:
        self._convert_to_f32, self._seq_dim = convert_to_f32, seq_dim
        self._state: tuple[torch.Tensor, torch.Tensor] | None = None
        self._dtype = torch.float32
        self._original: Any = None  # merges instead, where blocks do not fit

    def step(self, out: torch.Tensor, lse: torch.Tensor, partial: bool) -> None:
        """`partial`: the block is of the second half of the state's queries."""
        if self._state is None and self._original is None and not _fits(out, lse):
            self._original = _theirs(self._convert_to_f32, self._seq_dim)
        if self._original is not None:
            self._original.step(out, lse, partial)
        elif self._state is None:
            self._dtype = out.dtype
            dtype = torch.float32 if self._convert_to_f32 else out.dtype
            self._state = out.to(dtype, copy=True), lse.clone()
        else:
            state, state_lse = self._state
            if partial:
                state, state_lse = (x.chunk(2, self._seq_dim)[1] for x in self._state)
            update_state(state, state_lse, out, lse)

    def results(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Output in the blocks' dtype and LSE, of their shapes."""
        if self._state is None:
            results: tuple[torch.Tensor, torch.Tensor] = self._original.results()
            return results
        out, lse = self._state
        return out.to(self._dtype), lse


def _fits(out: torch.Tensor, lse: torch.Tensor) -> bool:
    """Whether update_state takes such blocks; it records no gradients."""
    return (
        out.dtype in _DTYPES
        and lse.dtype == torch.float32
        and lse.shape in (out.shape[:-1], (*out.shape[:-1], 1))
        and not (torch.is_grad_enabled() and (out.requires_grad or lse.requires_grad))
    )


def enable() -> None:
    """Let PyTorch's context parallel merge by `update_state`, in this process, until `disable()`.

    Blocks that `update_state` does not take (float64, or of which a gradient is recorded) are
    merged by PyTorch's own class as before. Called again, it changes nothing.

    Raises
    ------
    RuntimeError
        This PyTorch has another class there, or none.

    Examples
    --------
    >>> from merge_attn_states.integrations import context_parallel
    >>> context_parallel.enable()
    >>> context_parallel.is_enabled()
    True
    >>> context_parallel.disable()
    """
    global _theirs
    module = _module()
    current = getattr(module, _NAME, None)
    if current is _Merger:
        return
    for method, expected in _METHODS.items():
        function = getattr(current, method, None)
        found = list(inspect.signature(function).parameters) if callable(function) else None
        if found != expected:
            raise RuntimeError(
                f"PyTorch {torch.__version__}: expected {_NAME}.{method}({', '.join(expected)}) in "
                f"{_MODULE}, got {found}; context parallel merges by itself there"
            )
    _theirs = current
    setattr(module, _NAME, _Merger)


def disable() -> None:
    """Put PyTorch's own class back, if `enable()` has replaced it."""
    if is_enabled():
        setattr(_module(), _NAME, _theirs)


def is_enabled() -> bool:
    """Whether PyTorch's context parallel merges by `update_state`."""
    return _theirs is not None and getattr(_module(), _NAME) is _Merger


def _module() -> ModuleType:
    try:
        return importlib.import_module(_MODULE)
    except ImportError as error:
        raise RuntimeError(
            f"PyTorch {torch.__version__}: there is no {_MODULE}; context parallel merges by itself"
        ) from error
