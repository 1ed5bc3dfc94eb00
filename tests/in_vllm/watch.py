"""Stands at every merge call that an engine makes: checks it, or times it."""

from __future__ import annotations

import contextlib
import importlib
import time
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch

from benchmarks.operands import Operands
from merge_attn_states.reference import merge_attn_states_reference

from .dispatcher import Merge, patched, unpatched
from .memory import copied

HOLDERS = (  # the backends' modules that bind the function by name, in an engine on CUDA
    "vllm.v1.attention.backends.flash_attn",
    "vllm.v1.attention.backends.flashinfer",
    "vllm.model_executor.layers.attention.mla_attention",
)


class Kind(NamedTuple):
    """What calls of one sort have in common."""

    heads: int
    head_size: int
    head_strides: tuple[int, ...]  # of output, prefix_output, suffix_output
    has_output_lse: bool
    has_context_count: bool
    in_place: bool


class Errors(NamedTuple):
    """The largest distances of one call's results from float64, whoever merged."""

    output: float
    output_lse: float


class Checked(NamedTuple):
    """One call of an engine."""

    kind: Kind
    tokens: int
    ours: Errors
    theirs: Errors


def kind_of(operands: Operands) -> Kind:
    output, prefix, suffix = operands.output, operands.prefix_output, operands.suffix_output
    return Kind(
        *output.shape[1:],
        tuple(rows.stride(1) for rows in (output, prefix, suffix)),
        operands.output_lse is not None,
        operands.prefill_tokens_with_context is not None,
        output.data_ptr() in (prefix.data_ptr(), suffix.data_ptr()),
    )


@contextlib.contextmanager
def standing_in(merge: Merge) -> Iterator[None]:
    """Put a function in the backends' place for the merge, while it lasts."""
    held: dict[Any, Merge] = {}
    for name in HOLDERS:
        try:
            module: Any = importlib.import_module(name)
        except ImportError:
            continue  # a backend that this machine lacks
        held[module] = module.merge_attn_states
        module.merge_attn_states = merge
    try:
        yield
    finally:
        for module, held_merge in held.items():
            module.merge_attn_states = held_merge


def far(operands: Operands, expected: tuple[torch.Tensor, torch.Tensor]) -> Errors:
    """How far the results in `operands` are from the expected ones; NaN counts as infinite.

    What is the same is no distance apart: -inf of an empty row too.
    """
    pairs = [(operands.output, expected[0])]
    if operands.output_lse is not None:
        pairs.append((operands.output_lse, expected[1]))
    distances = []
    for one, other in pairs:
        distance = torch.nan_to_num((one.double() - other).abs(), nan=torch.inf)
        distances.append(distance.masked_fill(one == other, 0.0).max().item())
    return Errors(*distances, *[0.0] * (2 - len(distances)))


def bound(args: tuple[Any, ...], named: dict[str, Any]) -> Operands:
    """A call's arguments by their names."""
    absent = {} if len(args) > 5 else {"output_lse": None}
    return Operands(*args, **absent | named)


def exact(inputs: Operands) -> tuple[torch.Tensor, torch.Tensor]:
    return merge_attn_states_reference(*inputs[1:5], *inputs[6:])


def merging_in_float64(*args: Any, **named: Any) -> None:
    """Merge in float64 and round once."""
    operands = bound(args, named)
    output, output_lse = exact(operands)
    operands.output.copy_(output)
    if operands.output_lse is not None:
        operands.output_lse.copy_(output_lse)


def checking(calls: list[Checked]) -> Merge:
    """Merge through the plugin, vLLM's own on a copy of the operands; both against float64."""

    def merge_attn_states(*args: Any, **kwargs: Any) -> None:
        operands = bound(args, kwargs)
        expected, theirs = exact(operands), copied(operands)
        patched()(*args, **kwargs)
        with unpatched() as merge:
            merge(*theirs)
        tokens = operands.output.shape[0]
        errors = far(operands, expected), far(theirs, expected)
        calls.append(Checked(kind_of(operands), tokens, *errors))

    return merge_attn_states


def timing(merge: Merge, calls: list[tuple[bool, float]]) -> Merge:
    """Merge, and note whether there was an output_lse, and the host's microseconds."""

    def merge_attn_states(*args: Any, **kwargs: Any) -> None:
        begin = time.perf_counter_ns()
        merge(*args, **kwargs)
        end = time.perf_counter_ns()
        has_lse = bound(args, kwargs).output_lse is not None
        calls.append((has_lse, (end - begin) / 1e3))

    return merge_attn_states
