"""Any number of parts, in any layout, and a running state: the typed, documented functions.

As in ops.py the arguments themselves are checked in C++ (csrc/core/validate_parts.cpp). Here stands
only what C++ cannot see: that an argument is a tensor, or a sequence of them, at all.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from operator import attrgetter
from typing import Any, Literal

import torch

from . import _operator, _sharded
from ._library import fast_path
from ._states_operators import new_lse, new_output, result_shape

__all__ = ["merge_states", "update_state"]

_op = torch.ops.merge_attn_states
_fast_merge, _ = fast_path("merge_states")  # None where there is none
_fast_update, _ = fast_path("update_state")
_DTYPE_OR_NONE = (torch.dtype, type(None))
_MOST_PARTS = 16  # in a list that the fast path takes: kMostParts of csrc/torch/eager_states.cpp
_WRITTEN = [0, 1]  # output and LSE, by both operators that write in place
_requires_grad = attrgetter("requires_grad")
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # Dynamo knows it by any name

Base = Literal["e", "2"]
Parts = Sequence[torch.Tensor] | torch.Tensor
PerPart = Sequence[torch.Tensor | None]


def merge_states(
    outputs: Parts,
    lses: Parts,
    *,
    dim: int | None = None,
    index: PerPart | None = None,
    empty: PerPart | None = None,
    sink: torch.Tensor | None = None,
    lse_base: Base | Sequence[Base] = "e",
    out_lse_base: Base | None = None,
    out: torch.Tensor | None = None,
    out_lse: torch.Tensor | None = None,
    out_dtype: torch.dtype | None = None,
    out_scale: torch.Tensor | None = None,
    return_lse: bool = True,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Merge any number of attention states of the same queries, exactly, in one launch.

    Each part is a normalised attention output with the log-sum-exp of its scores; the result is
    what one attention over all parts' keys gives (section 2.2 of arXiv 2501.01005). A part whose
    LSE is -inf or +inf saw no keys: it has weight 0 and its values are never used. Where all parts
    are empty, the output is 0 and the LSE -inf; a NaN LSE makes its own row NaN. Parts are summed
    in their order. Two natural parts give the bits of `merge_attn_states`.

    Parameters
    ----------
    outputs : sequence of torch.Tensor, or torch.Tensor
        Each [*rows, head_size] with one to four row dimensions and any strides: float32, float16
        and bfloat16, mixed freely; or all float64; or all of one FP8 dtype. Or one tensor with the
        parts along `dim`. At most 200, and 1,024 where they differ in their memory alone and have
        neither `index` nor `empty`.
    lses : sequence of torch.Tensor, or torch.Tensor
        Each of the shape `output.shape[:-1]`, or that with a trailing 1, and any strides: an LSE
        [batch, num_heads, num_tokens] beside an output [batch, num_tokens, num_heads, head_size] is
        `lse.transpose(1, 2)`. (Where num_tokens == num_heads a wrong layout cannot be seen.)
        float32 (float64 for float64 outputs). Of a stack, the parts lie along `dim` too.
    dim : int, optional
        The parts' dimension of a stack, 0 or more.
    index : sequence of torch.Tensor or None, optional
        For outputs [num_rows, num_heads, head_size] and each part None or int32 or int64
        [num_tokens]: for each row of the result the part's row, or -1 where it is absent. Another
        number is an error on the CPU; on CUDA, where that is not known, the part is absent there.
    empty : sequence of torch.Tensor or None, optional
        For each part None or bools of its LSE's shape: rows that saw no keys, whatever their LSE
        says.
    sink : torch.Tensor, optional
        [num_heads], the last row dimension: a logit in the base of the merged LSE that has weight
        and no values, as attention sinks do. float32, float16 or bfloat16 (float64 for float64
        outputs). +-inf: none.
    lse_base : "e", "2" or a sequence of them
        To which base the LSEs are logarithms: of all parts or of each.
    out_lse_base : "e" or "2", optional
        Of the merged LSE. None: the parts' own; where they differ it must be given.
    out : torch.Tensor, optional
        [*rows, head_size], written and returned. May be exactly one part.
    out_lse : torch.Tensor, optional
        [*rows] or [*rows, 1], written and returned. May be exactly one part's LSE.
    out_dtype : torch.dtype, optional
        Of a new output. None: the parts' dtype, float32 where they differ. float32, float16 and
        bfloat16 may be had of each other and of FP8 parts; an FP8 dtype with `out_scale`.
    out_scale : torch.Tensor, optional
        One float32: an FP8 output stores saturate(value / out_scale). None means 1 for an FP8
        output of FP8 parts.
    return_lse : bool
        False: no LSE is computed, and None returned.

    Returns
    -------
    tuple of torch.Tensor
        Output [*rows, head_size] and LSE [*rows]; contiguous where they are new.

    Raises
    ------
    TypeError
        An operand is no tensor, a list is none, or `outputs` is one tensor and there is no `dim`.
    ValueError
        What is wrong with an argument; the message names it, what was expected and what came, and
        nothing is written.
    UnavailableError, RuntimeError
        As for `merge_attn_states`.

    Notes
    -----
    Without `out` and `out_lse` the merge has gradients: of outputs, lses and sink. With them, it
    writes in place and has none, as `merge_attn_states`.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states import merge_states
    >>> outputs = [torch.full((4, 8, 64), value) for value in (0.0, 1.0, 5.0)]
    >>> lses = [torch.zeros(4, 8) for _ in outputs]
    >>> output, lse = merge_states(outputs, lses)
    >>> float(output[0, 0, 0])
    2.0
    """
    wanted = (out, out_lse, out_dtype, return_lse)
    if merged := _merge_eagerly(
        outputs, lses, dim, index, empty, sink, lse_base, out_lse_base, out_scale, *wanted
    ):
        return merged
    parts = (
        _tensors("outputs", outputs, dim),
        _tensors("lses", lses, dim),
        _per_part("index", index, outputs, dim),
        _per_part("empty", empty, outputs, dim),
        _dim(dim),
        _tensor("sink", sink),
        _bases(lse_base),
        _typed("out_lse_base", out_lse_base, str),
    )
    _tensor("out_scale", out_scale)
    _typed("out_dtype", out_dtype, torch.dtype)
    if not parts[0]:
        raise ValueError("outputs: expected one part or more, got 0")
    if out_lse is not None and not return_lse:
        raise ValueError("out_lse: expected none where return_lse is False, got a tensor")
    if out is not None and out_dtype is not None:
        raise ValueError(f"out_dtype: expected none beside out, got {out_dtype}")
    if _sharded.are_sharded((*parts[0], *parts[1], out, out_lse)):
        return _sharded.merge_shards(
            merge_states,
            *parts[:2],
            dim=dim,
            index=index,
            empty=empty,
            sink=sink,
            out=out,
            out_lse=out_lse,
            lse_base=lse_base,
            out_lse_base=out_lse_base,
            out_dtype=out_dtype,
            out_scale=out_scale,
            return_lse=return_lse,
        )
    if out is None and out_lse is None:
        args = (*parts, out_dtype, out_scale, return_lse)
        inspect = _op.inspect_merge_states.default
        new, lse = _operator.call(_op.merge_states.default, args, inspect, (None, None, *args))
        return new, lse if return_lse else None
    _tensor("out", out)
    _tensor("out_lse", out_lse)
    shape = result_shape(parts[0], dim, index)
    if out is None:
        out = new_output(parts[0], shape, out_dtype)
    if out_lse is None and return_lse:
        out_lse = new_lse(*parts[:2], shape)
    _operator.write(
        _op.merge_states_out.default,
        (out, out_lse, *parts, out_scale),
        _WRITTEN,
        _op.fresh_merge_states.default,
        _op.inspect_merge_states.default,
        (out, out_lse, *parts, None, out_scale),
    )
    return out, out_lse


def update_state(
    out: torch.Tensor,
    lse: torch.Tensor,
    block_out: torch.Tensor,
    block_lse: torch.Tensor,
    *,
    index: torch.Tensor | None = None,
    empty: torch.Tensor | None = None,
    lse_base: Base = "e",
) -> None:
    """Merge a block into a running state, in place, in one launch.

    The step of a ring, or of a loop over chunks of keys: the state (`out`, `lse`) becomes the merge
    of itself and the block, as by `merge_states([out, block_out], [lse, block_lse], out=out,
    out_lse=lse)`. A state begins with an LSE of -inf; what its output holds then is never used. A
    float32 state beside bfloat16 or float16 blocks does not lose at each step what 16 bits round
    off. A part of the rows is a view: `out[:, half:]` beside `lse[:, half:]`.

    Parameters
    ----------
    out : torch.Tensor
        [*rows, head_size], one to four row dimensions and any strides, read and written.
    lse : torch.Tensor
        [*rows] or [*rows, 1], any strides, float32 (float64 for float64 outputs), read and written.
    block_out, block_lse : torch.Tensor
        The same of the block, whose dtype may be another one of float32, float16 and bfloat16.
    index : torch.Tensor, optional
        int32 or int64 [num_rows], of outputs [num_rows, num_heads, head_size]: row t of the block
        is merged into row index[t] of the state, and skipped where that is -1. What becomes of a
        row that several are merged into is not defined. Another number is an error on the CPU; on
        CUDA, where that is not known, the row is skipped.
    empty : torch.Tensor, optional
        Bools of the shape of `block_lse`: rows of the block that saw no keys, whatever their LSE
        says.
    lse_base : "e" or "2"
        To which base both LSEs are logarithms.

    Raises
    ------
    TypeError, ValueError, UnavailableError, RuntimeError
        As for `merge_states`.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states import update_state
    >>> out, lse = torch.empty(4, 8, 64), torch.full((4, 8), -torch.inf)
    >>> for value in (0.0, 1.0, 5.0):
    ...     block = torch.full((4, 8, 64), value, dtype=torch.bfloat16)
    ...     update_state(out, lse, block, torch.zeros(4, 8))
    >>> round(float(out[0, 0, 0]), 5)
    2.0
    """
    merge_block(out, lse, block_out, block_lse, index, empty, lse_base)


def merge_block(
    out: torch.Tensor,
    lse: torch.Tensor,
    block_out: torch.Tensor,
    block_lse: torch.Tensor,
    index: torch.Tensor | None,
    empty: torch.Tensor | None,
    lse_base: Base,
    invert_empty: bool = False,
) -> None:
    """`update_state`, for callers whose mask may say where the block did see keys instead."""
    if (
        _fast_update is not None
        and not _is_dynamo_compiling()
        and _fast_update(out, lse, block_out, block_lse, index, empty, lse_base, invert_empty)
    ):
        return
    operands = {"out": out, "lse": lse, "block_out": block_out, "block_lse": block_lse}
    for name, operand in operands.items():
        if _tensor(name, operand) is None:
            raise TypeError(f"{name}: expected a torch.Tensor, got NoneType")
    options = (_tensor("index", index), _tensor("empty", empty), _bases(lse_base), invert_empty)
    if _sharded.are_sharded(operands.values()):
        update = functools.partial(merge_block, index=None, invert_empty=invert_empty)
        return _sharded.update_shards(update, operands, index, empty, lse_base)
    _operator.write(
        _op.update_state.default,
        (*operands.values(), *options),
        _WRITTEN,
        _op.fresh_update_state.default,
        _op.inspect_update_state.default,
    )


def _merge_eagerly(
    outputs: Any,
    lses: Any,
    dim: int | None,
    index: PerPart | None,
    empty: PerPart | None,
    sink: torch.Tensor | None,
    lse_base: Any,
    out_lse_base: Base | None,
    out_scale: torch.Tensor | None,
    out: torch.Tensor | None,
    out_lse: torch.Tensor | None,
    out_dtype: torch.dtype | None,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None] | None:
    """Merge lists of plain tensors without PyTorch's dispatcher; None where that steps aside."""
    # Dynamo takes this test for true while it compiles, so its graph holds the operator.
    if _fast_merge is None or _is_dynamo_compiling():
        return None
    if dim is not None:
        outputs, lses = [outputs], [lses]
    if not (dim is None or type(dim) is int) or not isinstance(out_dtype, _DTYPE_OR_NONE):
        return None
    contradicts = (out is not None and out_dtype is not None) or (
        out_lse is not None and not return_lse
    )
    if contradicts or not type(outputs) is type(lses) is list:
        return None
    for per_part in (index, empty):
        if per_part is not None and (dim is not None or type(per_part) is not list):
            return None
    operands = [*outputs, *lses] if sink is None else [*outputs, *lses, sink]
    if len(outputs) > _MOST_PARTS or {*map(type, operands)} != {torch.Tensor}:
        return None
    if out is None or (out_lse is None and return_lse):
        # Where the operator has to answer it makes results of its own: these would be a second
        # allocation, and a mode would see it.
        if (
            torch._C._len_torch_dispatch_stack()
            or torch._C._len_torch_function_stack()
            or torch._C._are_functorch_transforms_active()
            or (torch.is_grad_enabled() and any(map(_requires_grad, operands)))
        ):
            return None
        shape = result_shape(outputs, dim, index)
        if out is None:
            out = new_output(outputs, shape, out_dtype)
        if out_lse is None and return_lse:
            out_lse = new_lse(outputs, lses, shape)
    bases = lse_base if type(lse_base) is str else _bases(lse_base)
    try:
        merged = _fast_merge(
            out, out_lse, outputs, lses, dim, index, empty, sink, bases, out_lse_base, out_scale
        )
    except ValueError:
        if out_dtype is None:
            raise
        return None  # the operator knows that `out` was made of it
    return (out, out_lse) if merged else None


def _tensor(name: str, operand: torch.Tensor | None) -> torch.Tensor | None:
    if operand is not None and not isinstance(operand, torch.Tensor):
        raise TypeError(f"{name}: expected a torch.Tensor or None, got {type(operand).__name__}")
    return operand


def _tensors(name: str, parts: Parts, dim: int | None) -> list[torch.Tensor]:
    if isinstance(parts, torch.Tensor):
        if dim is None:
            raise TypeError(
                f"{name}: expected a sequence of tensors, or one tensor with dim, got one without"
            )
        return [parts]
    if dim is not None:
        raise TypeError(f"{name}: expected one tensor with dim, got {type(parts).__name__}")
    listed = _sequence(name, parts)
    for k, part in enumerate(listed):
        if not isinstance(part, torch.Tensor):
            raise TypeError(f"{name}[{k}]: expected a torch.Tensor, got {type(part).__name__}")
    return listed


def _per_part(
    name: str, operands: PerPart | None, outputs: Parts, dim: int | None
) -> list[torch.Tensor | None]:
    """Return one a part, or an empty list where there are none."""
    if operands is None:
        return []
    listed = _sequence(name, operands)
    if not listed:
        count = len(outputs) if isinstance(outputs, Sequence) else outputs.shape[dim or 0]
        raise ValueError(f"{name}: expected a tensor or None for each of {count} parts, got 0")
    for k, operand in enumerate(listed):
        _tensor(f"{name}[{k}]", operand)
    return listed


def _typed(name: str, value: Any, kind: type) -> Any:
    if value is not None and not isinstance(value, kind):
        raise TypeError(f"{name}: expected {kind.__name__} or None, got {type(value).__name__}")
    return value


def _dim(dim: Any) -> Any:
    if isinstance(dim, bool):  # an int to Python
        raise TypeError("dim: expected int or None, got bool")
    return _typed("dim", dim, int)


def _sequence(name: str, values: Any) -> list[Any]:
    if not isinstance(values, Sequence) or isinstance(values, str):
        raise TypeError(f"{name}: expected a sequence of tensors, got {type(values).__name__}")
    return list(values)


def _bases(lse_base: Base | Sequence[Base]) -> str:
    """Return a letter for all parts or for each, as the operator has it."""
    if not isinstance(lse_base, Sequence) or not all(isinstance(base, str) for base in lse_base):
        expected = '"e", "2" or a sequence of them'
        raise TypeError(f"lse_base: expected {expected}, got {type(lse_base).__name__}")
    if not isinstance(lse_base, str):
        for k, base in enumerate(lse_base):
            if len(base) != 1:
                raise ValueError(f'lse_base: expected "e" or "2", got {base!r} for part {k}')
    return "".join(lse_base)
