"""The operation as typed, documented Python functions.

An eager call with plain tensors goes straight to the kernels (csrc/torch/eager.cpp); every other
one, each that a tracer, a mode or a transform has to see among them, through
`torch.ops.merge_attn_states`. The arguments themselves are checked in one place for both, in C++
(csrc/core/validate.cpp). Here stands only what C++ cannot see: that an argument is a tensor at all
and that a count is a plain integer; and which exception a refusal is.
"""

from __future__ import annotations

import operator
from typing import Any, NamedTuple, SupportsIndex

import torch

from . import _operator
from ._library import fast_path

__all__ = ["SelectedKernel", "merge_attn_states", "selected_kernel"]

_op = torch.ops.merge_attn_states
_OPERANDS = _operator.operands(_op.merge_attn_states.default)
_WRITTEN = _operator.written(_op.merge_attn_states.default)
_COUNT = "prefill_tokens_with_context"
_fast, _ = fast_path()  # None where there is none
_is_dynamo_compiling = torch.compiler.is_dynamo_compiling  # Dynamo knows it by any name


class SelectedKernel(NamedTuple):
    """Which kernel a call runs, and the variant of it that tuning chose."""

    kernel: str
    variant: str


def merge_attn_states(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    prefill_tokens_with_context: SupportsIndex | None = None,
    output_scale: torch.Tensor | None = None,
) -> None:
    """Merge two attention states of the same queries into `output`, in place.

    Each part is a normalised attention output with the log-sum-exp of its scores. The merge is
    exact: the result is what one attention over both parts' keys gives (section 2.2 of
    arXiv 2501.01005). A part whose LSE is -inf or +inf saw no keys: it has weight 0 and its values
    are never used. Where both parts are empty, the output is 0 and the LSE -inf; a NaN LSE makes
    its own row NaN. Operands may have any strides.

    Parameters
    ----------
    output : torch.Tensor
        [num_tokens, num_heads, head_size], written. The inputs' dtype; or float8_e4m3fn or
        float8_e5m2 of float32, float16 or bfloat16 inputs, with `output_scale`; or float32,
        float16 or bfloat16 of FP8 inputs. May be exactly `prefix_output` or `suffix_output`.
    prefix_output, suffix_output : torch.Tensor
        [num_tokens, num_heads, head_size], both float32, float16, bfloat16, float64,
        float8_e4m3fn or float8_e5m2.
    prefix_lse, suffix_lse : torch.Tensor
        [num_heads, num_tokens], natural log, float32 (float64 for float64 outputs).
    output_lse : torch.Tensor, optional
        [num_heads, num_tokens], the same dtype, written with the merged LSE. May be exactly
        `prefix_lse` or `suffix_lse`.
    prefill_tokens_with_context : int, optional
        Tokens from this one on have no prefix: they take the suffix as it is. None: all have one.
    output_scale : torch.Tensor, optional
        One float32: an FP8 output stores saturate(value / output_scale). None means 1 for an FP8
        output of FP8 inputs and is refused for one of others; a scale is refused for every other
        output.

    Raises
    ------
    TypeError
        An operand is no tensor, or the count no integer (a bool and a tensor are none).
    ValueError
        An operand has the wrong rank, shape, dtype or device, the count is out of range, an output
        overlaps another operand partially or itself, or an operand requires grad under grad mode
        or has a forward-mode tangent. The message names the argument, what was expected and what
        came; nothing is written.
    UnavailableError
        This build or machine has no kernel for the device.
    RuntimeError
        CUDA refused the launch. In compiled or traced code each of these is what PyTorch makes of
        it, a ValueError or a RuntimeError whose message contains the sentence.

    Notes
    -----
    The merge writes in place and has no gradient, but autograd sees the write: backward through a
    tensor that was saved and then overwritten is PyTorch's own error.

    Examples
    --------
    >>> import torch
    >>> from merge_attn_states import merge_attn_states
    >>> prefix_output, suffix_output = torch.zeros(4, 8, 64), torch.ones(4, 8, 64)
    >>> prefix_lse, suffix_lse = torch.zeros(8, 4), torch.zeros(8, 4)
    >>> merge_attn_states(suffix_output, prefix_output, prefix_lse, suffix_output, suffix_lse)
    >>> float(suffix_output[0, 0, 0])
    0.5
    """
    # Dynamo takes this test for false while it compiles, so its graph holds what stands below.
    if (
        _fast is not None
        and not _is_dynamo_compiling()
        and _fast(
            output,
            prefix_output,
            prefix_lse,
            suffix_output,
            suffix_lse,
            output_lse,
            prefill_tokens_with_context,
            output_scale,
        )
    ):
        return
    operands = (output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse)
    args = _checked((*operands, output_scale), prefill_tokens_with_context)
    _operator.write(
        _op.merge_attn_states.default, args, _WRITTEN, _op.fresh_outputs.default, _op.check.default
    )


def selected_kernel(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    prefill_tokens_with_context: SupportsIndex | None = None,
    output_scale: torch.Tensor | None = None,
) -> SelectedKernel:
    """Tell which kernel `merge_attn_states` runs for these arguments; nothing is read or written.

    (An output that is a copy-on-write clone gets its own memory, as the merge would give it.)

    Parameters
    ----------
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse, \
prefill_tokens_with_context, output_scale
        As for `merge_attn_states`.

    Returns
    -------
    SelectedKernel
        kernel: "cpu", or on CUDA "vectorized" where the operands allow 16-byte packs (float32,
        float16 or bfloat16 inputs, head_size a multiple of 16 bytes, element stride 1, every base
        and row 16-byte aligned) and "generic" elsewhere. variant: free text for people.

    Raises
    ------
    TypeError, ValueError, UnavailableError
        As for `merge_attn_states`, but for what autograd refuses: nothing is written here.
    """
    operands = (output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse)
    args = _checked((*operands, output_scale), prefill_tokens_with_context)
    return SelectedKernel(*_operator.call(_op.selected_kernel.default, args, _op.check.default))


def _checked(
    operands: tuple[torch.Tensor | None, ...], count: SupportsIndex | None
) -> _operator.Args:
    """Refuse what is no tensor or no count, and return the operator's arguments."""
    for (name, optional), operand in zip(_OPERANDS.items(), operands, strict=True):
        if not isinstance(operand, torch.Tensor) and not (operand is None and optional):
            expected = "a torch.Tensor or None" if optional else "a torch.Tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(operand).__name__}")
    *others, output_scale = operands
    return (*others, _checked_count(count, operands[0]), output_scale)


def _checked_count(
    count: SupportsIndex | None, output: torch.Tensor | None
) -> int | torch.SymInt | None:
    """Return the count as an int (a SymInt while compiling)."""
    if count is None or isinstance(count, torch.SymInt):
        return count
    if type(count) is not int:
        # A tensor has __index__, but reading it would synchronise; a bool is a mistake.
        if isinstance(count, (bool, torch.Tensor)) or not hasattr(count, "__index__"):
            raise TypeError(f"{_COUNT}: expected an int or None, got {type(count).__name__}")
        count = operator.index(count)
    # Too long for the operator's schema to carry to C++, where a count is checked. Compiled code
    # has none so long, and a comparison here would tie its graph to the count.
    if not _operator.is_in_a_graph() and not -(2**63) <= count < 2**63:
        num_tokens = output.shape[0] if output is not None else 0
        raise ValueError(
            f"{_COUNT}: expected a count in [0, {num_tokens}] = [0, num_tokens], got {count}"
        )
    return count


_operator.register(_op.merge_attn_states.default)
_operator.register(_op.fresh_outputs.default)
_operator.register_negative(_op.selected_kernel.default, _WRITTEN)


@torch.library.register_fake("merge_attn_states::merge_attn_states")  # type: ignore[untyped-decorator]
def _fake(*args: Any) -> None:
    """Refuse in a trace what can be seen without memory: ranks, devices, expanded outputs.

    Without it, a CPU output with a meta prefix returns silently and does nothing.
    """
    output = args[0]
    op = _op.merge_attn_states.default
    for name, operand in _operator.named_tensors(op, args):
        rank = 2 if name.endswith("lse") else 3
        if name != "output_scale" and operand.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, got {operand.dim()}")
        if operand.device != output.device:
            raise ValueError(
                f"{name}: expected device {output.device}, the device of output, "
                f"got {operand.device}"
            )
    _operator.refuse_expanded(op, args)


@torch.library.register_fake("merge_attn_states::fresh_outputs")  # type: ignore[untyped-decorator]
def _fake_fresh_outputs(*args: Any) -> list[torch.Tensor]:
    _fake(*args)
    return [torch.empty_like(args[i]) for i in _operator.given(_WRITTEN, args)]


@torch.library.register_fake("merge_attn_states::selected_kernel")  # type: ignore[untyped-decorator]
def _fake_selected_kernel(*args: Any) -> None:
    _fake(*args)
    raise ValueError(f"output: expected a tensor with memory, got one without on {args[0].device}")
