"""What PyTorch is told of the operators of many parts: fake results, gradients, vmap."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from . import _operator

__all__ = ["new_lse", "new_output", "result_shape"]

_op = torch.ops.merge_attn_states

PerPart = Sequence[torch.Tensor | None]


def result_shape(
    outputs: Sequence[torch.Tensor], dim: int | None, index: PerPart | None
) -> Sequence[int]:
    """Return the shape of the merged output, as far as its operands have one."""
    if not outputs:
        raise ValueError("outputs: expected one part or more, got 0")
    shape: Sequence[int] = outputs[0].shape
    if dim is not None:
        shape = [size for i, size in enumerate(shape) if i != dim]
    if index and index[0] is not None and index[0].dim() == 1:
        shape = [index[0].shape[0], *shape[1:]]
    return shape


def new_output(
    outputs: Sequence[torch.Tensor], shape: Sequence[int], dtype: torch.dtype | None
) -> torch.Tensor:
    """Return a contiguous output of that shape, of the parts' dtype if none is given."""
    if dtype is None:
        dtypes = {output.dtype for output in outputs}
        dtype = outputs[0].dtype if len(dtypes) == 1 else torch.float32
    return _new(outputs[0], shape, dtype)


def new_lse(
    outputs: Sequence[torch.Tensor], lses: Sequence[torch.Tensor], shape: Sequence[int]
) -> torch.Tensor:
    """Return a contiguous LSE of an output of that shape."""
    like = lses[0] if lses else outputs[0]
    return _new(like, shape[:-1], lse_dtype_of(outputs[0].dtype))


def lse_dtype_of(dtype: torch.dtype) -> torch.dtype:
    """The dtype of the LSEs beside outputs of this one."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def _new(like: torch.Tensor, shape: Sequence[int], dtype: torch.dtype) -> torch.Tensor:
    # Half the time of new_empty; but the sizes of a graph and its fake tensors may not be known.
    is_real = type(like) is torch.Tensor and not _operator.is_in_a_graph()
    if is_real and like.shape == shape and like.dtype == dtype:
        return torch.empty_like(like, memory_format=torch.contiguous_format)
    return like.new_empty(shape, dtype=dtype)


class _MergeStates(torch.autograd.Function):
    """The merge with its gradients: of outputs, lses and sink, which come one behind the other."""

    @staticmethod
    def forward(ctx: Any, merge: Any, args: _operator.Args, *operands: torch.Tensor | None) -> Any:
        merged = merge()
        outputs, _, _, *_ = args
        named = {f"outputs[{k}]": x for k, x in enumerate(outputs)} | {"out": merged[0]}
        for name, operand in named.items():
            if operand.dtype in (torch.float8_e4m3fn, torch.float8_e5m2):
                raise ValueError(
                    f"{name}: expected a dtype that has gradients, got {operand.dtype}; call it "
                    "under torch.no_grad() or on detached tensors"
                )
        ctx.save_for_backward(*operands)
        ctx.set_materialize_grads(False)
        ctx.args = [len(x) if isinstance(x, list) else x for x in args]
        ctx.like = merged[0].shape, merged[0].dtype
        return merged

    @staticmethod
    def backward(
        ctx: Any, grad_out: torch.Tensor | None, grad_lse: torch.Tensor | None
    ) -> tuple[Any, ...]:
        num_outputs, num_lses, num_index, num_empty, dim, *_ = ctx.args
        saved = iter(ctx.saved_tensors)
        outputs, lses, sink, index, empty = (
            [next(saved) for _ in range(num_outputs)],
            [next(saved) for _ in range(num_lses)],
            next(saved),
            [next(saved) for _ in range(num_index)],
            [next(saved) for _ in range(num_empty)],
        )
        if grad_out is None:
            shape, dtype = ctx.like
            grad_out = outputs[0].new_zeros((), dtype=dtype).expand(shape)
        *_, lse_base, out_lse_base, _, _, _, invert_empty = ctx.args
        parts = (outputs, lses, index, empty, dim, sink, lse_base, out_lse_base, invert_empty)
        grads = _op.merge_states_backward.default(grad_out, grad_lse, *parts)
        of_outputs, of_lses = (_of_operands(each, dim, index, outputs) for each in grads[:2])
        of_sink = None
        if sink is not None:
            of_sink = grads[2].reshape(-1, sink.shape[0]).sum(0).to(sink.dtype)
        return (
            None,
            None,
            *(grad.to(x.dtype) for grad, x in zip(of_outputs, outputs, strict=True)),
            *(grad.reshape(x.shape) for grad, x in zip(of_lses, lses, strict=True)),
            of_sink,
            *[None] * (num_index + num_empty),
        )


def _of_operands(
    grads: torch.Tensor, dim: int | None, index: PerPart | None, outputs: Sequence[torch.Tensor]
) -> list[torch.Tensor]:
    """Return each operand's gradient from the parts', which come in the merge's rows."""
    if dim is not None and not index:
        return [grads.movedim(0, dim)]  # a view: autograd takes a gradient of any strides
    parts = outputs if dim is None else outputs[0].unbind(dim)
    of_parts = [
        _scattered(grad, index[k] if index else None, part.shape[0])
        for k, (grad, part) in enumerate(zip(grads.unbind(), parts, strict=True))
    ]
    return of_parts if dim is None else [torch.stack(of_parts, dim)]


def _scattered(grads: torch.Tensor, index: torch.Tensor | None, num_rows: int) -> torch.Tensor:
    """Add each row's gradient to the part's row that it came from; an absent one's is 0."""
    if index is None:
        return grads
    whole = grads.new_zeros(num_rows, *grads.shape[1:])
    if num_rows == 0:
        return whole
    return whole.index_add(0, index.where((index >= 0) & (index < num_rows), 0), grads)


def _merge_states_kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
    op = _op.merge_states.default
    _operator.refuse_tangents(_operator.named_tensors(op, args), "merge_states has none of its own")

    def merge() -> Any:
        return op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)

    outputs, lses, index, empty, _, sink, *_ = filled = _operator.filled(op, args)
    differentiable = [*outputs, *lses, sink]
    if not torch.is_grad_enabled() or not any(
        x is not None and x.requires_grad for x in differentiable
    ):
        return merge()
    operands = (*differentiable, *index, *empty)
    return _MergeStates.apply(merge, filled, *operands)  # type: ignore[no-untyped-call]


_operator.implement(_op.merge_states.default, "Autograd", _merge_states_kernel)
_operator.register(
    _op.merge_states_backward.default, because="merge_states has no second derivative"
)
_operator.register(_op.merge_states_out.default)
_operator.register(_op.update_state.default)
_operator.register(_op.fresh_merge_states.default)
_operator.register(_op.fresh_update_state.default)
_operator.register_negative(_op.merge_states.default, [])


def _check_trace(op: _operator.Op, args: _operator.Args, of: str) -> None:
    """Refuse in a trace what can be seen without memory: ranks, devices, expanded results.

    `of` names the operand that all others are beside: the first part, or the state.
    """
    named = dict(_operator.named_tensors(op, args))
    reference = named[of]
    values = dict(zip([x.name for x in op._schema.arguments], args, strict=False))
    of_parts = reference.dim()
    of_merged = of_parts - (values.get("dim") is not None)
    if not 2 <= of_merged <= 5:
        raise ValueError(f"{of}: expected 2 to 5 dimensions, got {of_merged}")
    per_row, per_merged_row = [of_parts - 1, of_parts], [of_merged - 1, of_merged]
    ranks = {"outputs": [of_parts], "block_out": [of_parts], "out": [of_merged]}
    ranks |= {"lses": per_row, "block_lse": per_row, "index": [1], "sink": [1]}
    ranks |= dict.fromkeys(("lse", "out_lse", "empty"), per_merged_row)
    for name, operand in named.items():
        expected = ranks.get(name.partition("[")[0], [operand.dim()])
        if operand.dim() not in expected:
            raise ValueError(f"{name}: expected {expected[0]} dimensions, got {operand.dim()}")
        if operand.device != reference.device:
            raise ValueError(
                f"{name}: expected device {reference.device}, the device of {of}, "
                f"got {operand.device}"
            )
    _operator.refuse_expanded(op, args)


@torch.library.register_fake("merge_attn_states::merge_states")  # type: ignore[untyped-decorator]
def _fake_merge_states(*args: Any) -> tuple[torch.Tensor, torch.Tensor]:
    outputs, lses, index, _, dim, _, _, _, out_dtype, _, return_lse, *_ = _operator.filled(
        _op.merge_states.default, args
    )
    shape = result_shape(outputs, dim, index)
    _check_trace(_op.merge_states.default, args, "outputs[0]")
    lse = (
        new_lse(outputs, lses, shape)
        if return_lse
        else outputs[0].new_empty([0], dtype=torch.float32)
    )
    return new_output(outputs, shape, out_dtype), lse


@torch.library.register_fake("merge_attn_states::merge_states_backward")  # type: ignore[untyped-decorator]
def _fake_merge_states_backward(*args: Any) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    _, _, outputs, lses, index, _, dim, sink, *_ = _operator.filled(
        _op.merge_states_backward.default, args
    )
    num_parts = len(outputs) if dim is None else outputs[0].shape[dim]
    shape = result_shape(outputs, dim, index)
    of_parts = [num_parts, *shape]
    of_sink = shape if sink is not None else [0, 0]
    return (
        new_output(outputs, of_parts, None),
        new_lse(outputs, lses, of_parts),
        new_lse(outputs, lses, of_sink),
    )


@torch.library.register_fake("merge_attn_states::merge_states_out")  # type: ignore[untyped-decorator]
def _fake_merge_states_out(*args: Any) -> None:
    _check_trace(_op.merge_states_out.default, args, "outputs[0]")


@torch.library.register_fake("merge_attn_states::update_state")  # type: ignore[untyped-decorator]
def _fake_update_state(*args: Any) -> None:
    _check_trace(_op.update_state.default, args, "out")


@torch.library.register_fake("merge_attn_states::fresh_merge_states")  # type: ignore[untyped-decorator]
def _fake_fresh_merge_states(*args: Any) -> list[torch.Tensor]:
    _fake_merge_states_out(*args)
    return [torch.empty_like(operand) for operand in args[:2] if operand is not None]


@torch.library.register_fake("merge_attn_states::fresh_update_state")  # type: ignore[untyped-decorator]
def _fake_fresh_update_state(*args: Any) -> list[torch.Tensor]:
    _fake_update_state(*args)
    return [operand.clone() for operand in args[:2]]


def _batched(operand: torch.Tensor | None, dim: int | None, size: int) -> torch.Tensor | None:
    if operand is None:
        return None
    return operand.expand(size, *operand.shape) if dim is None else operand.movedim(dim, 0)


def _batched_parts(info: Any, in_dims: tuple[Any, ...], args: tuple[Any, ...]) -> list[Any]:
    """Return the operator's arguments from `outputs` on with the batch as a first row dimension."""
    outputs, lses, index, empty, dim, sink, *others = args
    if index:
        raise ValueError(
            "index: expected none under torch.vmap, which adds a row dimension, got a list; index "
            "the parts before"
        )
    if sink is not None and in_dims[5] is not None:
        raise ValueError(
            "sink: expected one that vmap does not batch (in_dims None), since all rows share it, "
            "got one for each"
        )
    outputs, lses, empty = (
        [_batched(x, d, info.batch_size) for x, d in zip(operands, dims, strict=True)]
        for operands, dims in zip((outputs, lses, empty), (*in_dims[:2], in_dims[3]), strict=True)
    )
    return [outputs, lses, [], empty, None if dim is None else dim + 1, sink, *others]


def _vmap_merge_states(info: Any, in_dims: tuple[Any, ...], *args: Any) -> tuple[Any, Any]:
    filled = _operator.filled(_op.merge_states.default, args)
    in_dims = (*in_dims, *[None] * (len(filled) - len(in_dims)))
    merged = _op.merge_states.default(*_batched_parts(info, in_dims, filled))
    return merged, (0, 0 if filled[10] else None)


torch.library.register_vmap("merge_attn_states::merge_states", _vmap_merge_states)
