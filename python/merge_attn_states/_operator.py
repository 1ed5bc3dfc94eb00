"""What stands around an operator that writes in place: how it is called, what PyTorch asks of it.

The kernels for autograd and for the negative bit are registered from Python: PyTorch's stable C++
ABI neither dispatches below a key nor knows requires_grad or a version counter. Everything goes by
the operator's schema.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch.autograd import forward_ad

from ._errors import UnavailableError

__all__ = [
    *(
        "Args",
        "Op",
        "call",
        "filled",
        "given",
        "implement",
        "is_in_a_graph",
        "named_tensors",
        "operands",
    ),
    *("register", "register_negative", "write", "written"),
]

Args = tuple[Any, ...]  # an operator's, in its order
Op = torch._ops.OpOverload[..., Any]

_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # Dynamo knows it by any name
_library = torch.library.Library("merge_attn_states", "IMPL")  # type: ignore[no-untyped-call]


def operands(op: Op) -> dict[str, bool]:
    """Return the names of the operator's tensors, in its order, and whether each is optional."""
    types = {argument.name: str(argument.type) for argument in op._schema.arguments}
    return {name: kind.startswith("Optional") for name, kind in types.items() if "Tensor" in kind}


def written(op: Op) -> list[int]:
    """Return the positions of the arguments that the operator writes."""
    aliases = [argument.alias_info for argument in op._schema.arguments]
    return [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]


def named_tensors(op: Op, args: Args) -> Iterator[tuple[str, torch.Tensor]]:
    """Yield what was given of the operator's tensors; the dispatcher leaves defaults out."""
    for argument, value in zip(op._schema.arguments, args, strict=False):
        if isinstance(value, torch.Tensor):
            yield argument.name, value
        elif isinstance(value, (list, tuple)):
            for k, element in enumerate(value):
                if isinstance(element, torch.Tensor):
                    yield f"{argument.name}[{k}]", element


def filled(op: Op, args: Args) -> Args:
    """Return the arguments with the defaults that the dispatcher left out."""
    defaults = [argument.default_value for argument in op._schema.arguments]
    return (*args, *defaults[len(args) :])


def call(op: Op, args: Args, check: Op, check_args: Args | None = None) -> Any:
    """Run the operator; what it refuses is a ValueError on every PyTorch.

    A std::invalid_argument of an operator is a RuntimeError from PyTorch 2.15 on, so `check` is
    asked what is wrong with the same arguments, in its own order: a status and a sentence.
    """
    try:
        return op(*args)
    except RuntimeError:
        refusal = _refusal(check, args if check_args is None else check_args)
        if refusal is None:
            raise
        raise refusal from None


def write(
    op: Op, args: Args, positions: list[int], fresh: Op, check: Op, check_args: Args | None = None
) -> None:
    """Run an operator that writes the arguments at these positions, eager or inside a graph.

    In a graph and grad mode, into tensors that `fresh` makes of the same arguments: what autograd
    saves of a graph may be the memory that Inductor lets the operator write, and after the next
    write to it backward would be an error.
    """
    if not is_in_a_graph():
        call(op, args, check, check_args)
        return
    positions = given(positions, args)
    # One that requires grad is for the operator to refuse.
    if not torch.is_grad_enabled() or any(args[i].requires_grad for i in positions):
        op(*args)
        return
    merged = list(args)
    for i, tensor in zip(positions, fresh(*args), strict=True):
        merged[i] = tensor
    op(*merged)
    for i in positions:
        args[i].copy_(merged[i])


def is_in_a_graph() -> bool:
    """Whether this very call is being traced by torch.compile or torch.export.

    `is_compiling` is true in every thread while one compiles; an export has modes of its thread.
    """
    return _is_dynamo_compiling() or (
        torch.compiler.is_compiling() and torch._C._len_torch_dispatch_stack() > 0
    )


def _refusal(check: Op, args: Args) -> Exception | None:
    """Say what is wrong with the arguments; None where it is not for the C entry to say."""
    try:
        status, sentence, *_ = check(*args)
    except Exception:  # an operand that no kernel gets to see, or a mode that does not know `check`
        return None
    # enum merge_attn_states_status in include/merge_attn_states.h
    return {1: ValueError(sentence), 2: UnavailableError(sentence)}.get(status)


def register(op: Op, because: str = "the merge writes in place and has no gradient") -> None:
    """Let autograd and the negative bit see what `op` reads and writes.

    Of what has or wants a derivative it says that there is none, `because` of something.
    """
    implement(op, "Autograd", _autograd(op, because))
    register_negative(op, written(op))


def register_negative(op: Op, outputs: list[int]) -> None:
    """Let `op` read an input with its sign and refuse an output that has the negative bit."""
    implement(op, "Negative", _negative(op, outputs))


def refuse_expanded(op: Op, args: Args) -> None:
    """Refuse in a trace a result that is expanded.

    PyTorch, which copies what a graph writes, would not name it.
    """
    for i in given(written(op), args):
        if _is_expanded(args[i]):
            raise ValueError(
                f"{op._schema.arguments[i].name}: expected memory of its own for each element, got "
                f"sizes {list(args[i].shape)} with strides {list(args[i].stride())} that overlap "
                "themselves"
            )


def _is_expanded(tensor: torch.Tensor) -> bool:
    from torch.fx.experimental.symbolic_shapes import statically_known_true  # slow to import

    return any(
        statically_known_true(stride == 0) and statically_known_true(size > 1)
        for size, stride in zip(tensor.shape, tensor.stride(), strict=True)
    )


def implement(op: Op, key: str, kernel: Callable[..., Any]) -> None:
    """Register a kernel that gets the call's dispatch keys first."""
    _library.impl(op._schema.name, kernel, key, with_keyset=True)  # type: ignore[no-untyped-call]


def _autograd(op: Op, because: str) -> Callable[..., Any]:
    """Make the kernel that refuses a derivative and tells autograd of the write.

    In inference mode PyTorch does not call it.
    """
    positions = written(op)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        refuse_derivatives(named_tensors(op, args), because)
        result = op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        # Under no_grad too: what was saved for backward before is overwritten all the same. Unlike
        # torch.autograd.graph.increment_version it passes inference tensors by.
        torch._C._increment_version([args[i] for i in given(positions, args)])
        return result

    return kernel


def refuse_derivatives(operands: Iterable[tuple[str, torch.Tensor]], because: str) -> None:
    if torch.is_grad_enabled():
        for name, operand in (operands := list(operands)):
            if operand.requires_grad:
                raise ValueError(
                    f"{name}: expected a tensor that does not require grad, since {because}; call "
                    "it under torch.no_grad() or on detached tensors"
                )
    refuse_tangents(operands, because)


def refuse_tangents(operands: Iterable[tuple[str, torch.Tensor]], because: str) -> None:
    """Refuse what has a derivative of forward mode, which would be lost."""
    if forward_ad._current_level < 0:
        return
    for name, operand in operands:
        if forward_ad.unpack_dual(operand).tangent is not None:  # type: ignore[no-untyped-call]
            raise ValueError(
                f"{name}: expected a tensor without a forward-mode tangent, since {because}; call "
                "it on unpack_dual(...).primal"
            )


def _negative(op: Op, positions: list[int]) -> Callable[..., Any]:
    """Make the kernel that reads an input with its sign and refuses an output that has one."""
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Negative)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> Any:
        for i in given(positions, args):
            if args[i].is_neg():
                raise ValueError(
                    f"{op._schema.arguments[i].name}: expected a tensor that can be written in "
                    "place, got one with the negative bit; call resolve_neg() first"
                )
        return op.redispatch(keyset & below, *map(_resolved, args))

    return kernel


def _resolved(argument: Any) -> Any:
    if isinstance(argument, (list, tuple)):
        return [_resolved(element) for element in argument]
    return argument.resolve_neg() if isinstance(argument, torch.Tensor) else argument


def given(positions: list[int], args: Args) -> list[int]:
    """Return those of the positions at which something was given."""
    return [i for i in positions if i < len(args) and args[i] is not None]
