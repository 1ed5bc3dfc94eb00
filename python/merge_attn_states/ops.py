"""The operation as typed, documented Python functions.

An eager call with plain tensors goes straight to the kernels (csrc/module.cpp); every other one,
each that a tracer, a mode or a transform has to see among them, through
`torch.ops.merge_attn_states`. The arguments themselves are checked in one place for both, in C++
(csrc/merge_args.cpp). Here stands only what C++ cannot see: that an argument is a tensor at all,
that a count is a plain integer, and what autograd has to know of a write.
"""

from __future__ import annotations

import operator
from typing import NamedTuple, SupportsIndex

import torch

from ._library import fast_path

__all__ = ["SelectedKernel", "merge_attn_states", "selected_kernel"]

_op = torch.ops.merge_attn_states
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
        float8_e5m2 of float32, float16 or bfloat16 inputs, with `output_scale`. May be exactly
        `prefix_output` or `suffix_output`.
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
        One float32: an FP8 output stores saturate(value / output_scale). None means 1 for FP8
        inputs and is refused for others.

    Raises
    ------
    TypeError
        An operand is no tensor, or the count no integer (a bool and a tensor are none).
    ValueError
        An operand has the wrong rank, shape, dtype or device, the count is out of range, an output
        overlaps another operand partially or itself, or an operand requires grad under grad mode.
        The message names the argument, what was expected and what came; nothing is written.
    RuntimeError
        This build or machine has no kernel for the device, or CUDA refused the launch.

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
    tensors = (output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse)
    count = _check((*tensors, output_scale), prefill_tokens_with_context)
    _refuse_grad((*tensors, output_scale))
    if not torch.compiler.is_compiling():  # a compiled graph resolves the bit by itself
        _refuse_negative_bit(output, output_lse)
    _op.merge_attn_states(*tensors, count, output_scale)
    # An op registered from C++ does not tell autograd of its write: a tensor saved for backward and
    # then overwritten would give a silently wrong gradient (2.11 and 2.13). A compiled graph is
    # functionalised and needs none of this.
    if not torch.compiler.is_compiling() and not torch.is_inference_mode_enabled():
        for written in (output, output_lse):
            if written is not None and not written.is_inference():
                torch.autograd.graph.increment_version(written)


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
    TypeError, ValueError, RuntimeError
        As for `merge_attn_states`.
    """
    tensors = (output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse)
    count = _check((*tensors, output_scale), prefill_tokens_with_context)
    return SelectedKernel(*_op.selected_kernel(*tensors, count, output_scale))


_Operands = tuple[torch.Tensor | None, ...]
_NAMES = (
    "output",
    "prefix_output",
    "prefix_lse",
    "suffix_output",
    "suffix_lse",
    "output_lse",
    "output_scale",
)
_OPTIONAL = ("output_lse", "output_scale")


def _check(operands: _Operands, count: SupportsIndex | None) -> int | torch.SymInt | None:
    """Refuse what is no tensor and return the count as an int (a SymInt while compiling)."""
    for name, operand in zip(_NAMES, operands, strict=True):
        if not isinstance(operand, torch.Tensor) and not (operand is None and name in _OPTIONAL):
            expected = "a torch.Tensor or None" if name in _OPTIONAL else "a torch.Tensor"
            raise TypeError(f"{name}: expected {expected}, got {type(operand).__name__}")
    if count is None or isinstance(count, torch.SymInt):
        return count
    if type(count) is not int:
        # A tensor has __index__, but reading it would synchronise; a bool is a mistake.
        if isinstance(count, (bool, torch.Tensor)) or not hasattr(count, "__index__"):
            raise TypeError(
                f"prefill_tokens_with_context: expected an int or None, got {type(count).__name__}"
            )
        count = operator.index(count)
    # Too long for the operator's schema to carry to C++, where a count is checked. Compiled code
    # has none so long, and a comparison here would tie its graph to the count.
    if not torch.compiler.is_compiling() and not -(2**63) <= count < 2**63:
        num_tokens = operands[0].shape[0] if operands[0] is not None else 0
        raise ValueError(
            f"prefill_tokens_with_context: expected a count in [0, {num_tokens}] = "
            f"[0, num_tokens], got {count}"
        )
    return count


def _refuse_grad(operands: _Operands) -> None:
    if not torch.is_grad_enabled():
        return
    for name, operand in zip(_NAMES, operands, strict=True):
        if operand is not None and operand.requires_grad:
            raise ValueError(
                f"{name}: expected a tensor that does not require grad, since the merge writes in "
                "place and has no gradient; call it under torch.no_grad() or on detached tensors"
            )


def _refuse_negative_bit(*written: torch.Tensor | None) -> None:
    for name, operand in zip(("output", "output_lse"), written, strict=True):
        if operand is not None and operand.is_neg():
            raise ValueError(
                f"{name}: expected a tensor that can be written in place, got one with the "
                "negative bit; call resolve_neg() first"
            )


@torch.library.register_fake("merge_attn_states::merge_attn_states")  # type: ignore[untyped-decorator]
def _fake(
    output: torch.Tensor,
    prefix_output: torch.Tensor,
    prefix_lse: torch.Tensor,
    suffix_output: torch.Tensor,
    suffix_lse: torch.Tensor,
    output_lse: torch.Tensor | None = None,
    prefill_tokens_with_context: int | None = None,
    output_scale: torch.Tensor | None = None,
) -> None:
    """Refuse in a trace what can be seen without memory: ranks and devices.

    Without it, a CPU output with a meta prefix returns silently and does nothing.
    """
    operands = (output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse)
    for name, operand, rank in zip(
        _NAMES, (*operands, output_scale), (3, 3, 2, 3, 2, 2, None), strict=True
    ):
        if operand is None:
            continue
        if rank is not None and operand.dim() != rank:
            raise ValueError(f"{name}: expected {rank} dimensions, got {operand.dim()}")
        if operand.device != output.device:
            raise ValueError(
                f"{name}: expected device {output.device}, the device of output, "
                f"got {operand.device}"
            )
