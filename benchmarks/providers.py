"""Who is measured on a GPU or a CPU, and what each of them cannot do."""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

import merge_attn_states

from . import vllm
from .check import check
from .operands import Operands
from .timing import Call


class Provider(NamedTuple):
    """`refuses` says why operands cannot be given to it, empty where they can."""

    name: str
    bind: Callable[[Any], Call]
    refuses: Callable[[Any], str] = lambda operands: ""


def merge_in_pytorch(*operands: Tensor) -> None:
    """Merge two parts as one writes section 2.2 of arXiv 2501.01005 in PyTorch.

    They may not both be empty. Run eagerly, and by torch.compile.
    """
    output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse = operands
    largest = torch.maximum(prefix_lse, suffix_lse)
    prefix_weight, suffix_weight = (prefix_lse - largest).exp(), (suffix_lse - largest).exp()
    total = prefix_weight + suffix_weight
    output_lse.copy_(largest + total.log())
    prefix_weight = (prefix_weight / total).T.unsqueeze(-1)  # [H, N] -> [N, H, 1]
    suffix_weight = (suffix_weight / total).T.unsqueeze(-1)
    output.copy_(prefix_weight * prefix_output + suffix_weight * suffix_output)


def _bind_compiled(operands: Operands) -> Call:
    torch._dynamo.config.recompile_limit = 1000  # past it dynamo silently runs eagerly
    return partial(torch.compile(merge_in_pytorch, dynamic=False), *operands[:6])


OURS = Provider("ours", lambda o: partial(merge_attn_states.merge_attn_states, *o))
OURS_OPS = Provider(
    "ours_ops", lambda o: partial(torch.ops.merge_attn_states.merge_attn_states, *o)
)
VLLM = Provider(
    "vllm", lambda o: partial(torch.ops._C.merge_attn_states, *vllm.arguments(o)), vllm.refuses
)
EAGER = Provider("eager", lambda o: partial(merge_in_pytorch, *o[:6]))
COMPILED = Provider("compile", _bind_compiled)


def failed(error: Exception) -> str:
    return f"failed: {type(error).__name__}: {str(error).partition(chr(10))[0]}"


def prepare(
    providers: Sequence[Provider],
    operands: Sequence[Any],
    check: Callable[[Call, Any], str] = check,
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """By provider its calls, one a set; or why there are none: who is wrong is not timed."""
    timed: dict[str, list[Call]] = {}
    refused: dict[str, str] = {}
    for provider in providers:
        if reason := provider.refuses(operands[0]):
            refused[provider.name] = f"not supported: {reason}"
            continue
        try:
            calls = [provider.bind(one) for one in operands]
            wrong = check(calls[0], operands[0]) or check(calls[-1], operands[-1])
        except Exception as error:  # whatever another project's code raises is its answer
            if provider.name.startswith("ours"):
                raise
            refused[provider.name] = failed(error)
            continue
        if wrong:
            refused[provider.name] = f"wrong: {wrong}"
        else:
            timed[provider.name] = calls
    return timed, refused
