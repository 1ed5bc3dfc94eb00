"""vLLM's merge: an installed package's, or its compiled op alone.

The op takes its arguments in another order than the Python function, and releases differ in how
many there are: they are matched by the names in its schema.
"""

import importlib
import importlib.metadata
from collections.abc import Callable
from typing import Any

import torch

from .operands import Operands

DISPATCHER = "vllm.v1.attention.ops.merge_attn_states"
RANKS = "vllm.v1.attention.ops.dcp"
COMMUNICATOR = "vllm.distributed.device_communicators.base_device_communicator"


def load(op_library: str | None) -> str:
    """Register the op; why it cannot be had, empty where it can."""
    try:
        if op_library:
            torch.ops.load_library(op_library)  # type: ignore[no-untyped-call]
        else:
            importlib.import_module("vllm._custom_ops")
    except (ImportError, OSError) as error:
        return str(error).splitlines()[0]
    if not hasattr(torch.ops._C, "merge_attn_states"):
        return "torch.ops._C.merge_attn_states is not registered"
    unknown = set(argument_names()) - set(Operands._fields)
    return f"the op has unknown arguments: {unknown}" if unknown else ""


def argument_names() -> list[str]:
    """Of the op, in its own order."""
    schema = torch.ops._C.merge_attn_states.default._schema
    return [argument.name for argument in schema.arguments]


def version(package: str = "vllm") -> str | None:
    """Of an installed package."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def arguments(operands: Operands) -> tuple[Any, ...]:
    """The operands in the op's order."""
    return tuple(getattr(operands, name) for name in argument_names())


def refuses(operands: Operands) -> str:
    """Why the op must not be given these: some of them would end in a dead CUDA context."""
    output, prefix, suffix = operands[0], operands.prefix_output, operands.suffix_output
    _, heads, head_size = output.shape
    if prefix.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no {prefix.dtype} inputs"
    if head_size % (16 // prefix.element_size()):
        return f"head size {head_size} is no multiple of 16 bytes"
    for rows in (output, prefix, suffix):
        if rows.stride(2) != 1 or rows.stride(0) != heads * rows.stride(1):
            return "a token's heads must follow one another"
        pack = 16 // prefix.element_size() * rows.element_size()
        if rows.data_ptr() % pack or rows.stride(1) * rows.element_size() % pack:
            return f"every row must be {pack}-byte aligned"
    if prefix.stride(1) != suffix.stride(1):
        return "both parts must have one head stride"
    given = {name for name, value in operands._asdict().items() if value is not None}
    absent = given - set(argument_names())
    return f"this release has no {' and '.join(sorted(absent))}" if absent else ""


def dispatcher() -> Callable[..., None] | None:
    """VLLM's own, where the package is installed."""
    if version() is None:
        return None
    function: Callable[..., None] = importlib.import_module(DISPATCHER).merge_attn_states
    return function
