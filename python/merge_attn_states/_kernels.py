"""What PyTorch asks of an operator that writes in place, beside its CPU and CUDA kernels.

Registered from Python: PyTorch's stable C++ ABI neither dispatches below a key nor knows
requires_grad or a version counter. Everything goes by the operator's schema.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.autograd import forward_ad

__all__ = ["operands", "register", "written"]

_library = torch.library.Library("merge_attn_states", "IMPL")
_Op = torch._ops.OpOverload[..., Any]


def operands(op: _Op) -> dict[str, bool]:
    """Return the names of the operator's tensors, in its order, and whether each is optional."""
    types = {argument.name: str(argument.type) for argument in op._schema.arguments}
    return {name: kind.startswith("Optional") for name, kind in types.items() if "Tensor" in kind}


def written(op: _Op) -> list[int]:
    """Return the positions of the arguments that the operator writes."""
    aliases = [argument.alias_info for argument in op._schema.arguments]
    return [i for i, alias in enumerate(aliases) if alias is not None and alias.is_write]


def register(op: _Op) -> None:
    """Let autograd and the negative bit see what `op` writes."""
    for key, kernel in (("Autograd", _autograd(op)), ("Negative", _negative(op))):
        _library.impl(op._schema.name, kernel, key, with_keyset=True)


def _autograd(op: _Op) -> Callable[..., None]:
    """Make the kernel that refuses a gradient and tells autograd of the write.

    The inputs' own keys below autograd do the rest, and in inference mode PyTorch asks neither.
    """
    names = [argument.name for argument in op._schema.arguments]
    positions = written(op)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        _refuse_derivatives(names, args)
        op.redispatch(keyset & torch._C._after_ADInplaceOrView_keyset, *args)
        # Under no_grad too: what was saved for backward before it is overwritten all the same. The
        # public function refuses inference tensors, this one passes them by.
        torch._C._increment_version(_tensors(args, positions))

    return kernel


def _refuse_derivatives(names: list[str], args: tuple[Any, ...]) -> None:
    grad_mode, level = torch.is_grad_enabled(), forward_ad._current_level
    if not grad_mode and level < 0:
        return
    for name, operand in zip(names, args, strict=False):  # defaults are left out
        if not isinstance(operand, torch.Tensor):
            continue
        if grad_mode and operand.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that does not require grad, since the merge writes in "
                "place and has no gradient; call it under torch.no_grad() or on detached tensors"
            )
        if level >= 0 and forward_ad.unpack_dual(operand).tangent is not None:
            raise ValueError(
                f"{name}: expected a tensor without a forward-mode tangent, since the merge writes "
                "in place and has no derivative; call it on forward_ad.unpack_dual(...).primal"
            )


def _negative(op: _Op) -> Callable[..., None]:
    """Make the kernel that reads an input with its sign and refuses an output that has one."""
    names = [argument.name for argument in op._schema.arguments]
    positions = written(op)
    below = torch._C._dispatch_keyset_full_after(torch._C.DispatchKey.Negative)

    def kernel(keyset: torch._C.DispatchKeySet, *args: Any) -> None:
        for i in positions:
            if i < len(args) and args[i] is not None and args[i].is_neg():
                raise ValueError(
                    f"{names[i]}: expected a tensor that can be written in place, got one with the "
                    "negative bit; call resolve_neg() first"
                )
        resolved = (x.resolve_neg() if isinstance(x, torch.Tensor) else x for x in args)
        op.redispatch(keyset & below, *resolved)

    return kernel


def _tensors(args: tuple[Any, ...], positions: list[int]) -> list[torch.Tensor]:
    return [args[i] for i in positions if i < len(args) and args[i] is not None]
