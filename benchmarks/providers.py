"""Who is measured on a GPU or a CPU, and what each of them cannot do."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

import merge_attn_states

from . import vllm
from .check import Bound, check
from .formula import merge_in_pytorch
from .operands import Operands
from .timing import Call


class Provider(NamedTuple):
    """`refuses` says why operands cannot be given to it, empty where they can."""

    name: str
    bind: Callable[[Operands], Bound]
    refuses: Callable[[Operands], str] = lambda operands: ""


def _bind(function: Callable[..., object], count: int = 8) -> Callable[[Operands], Bound]:
    """Bind to the first operands, in the op's order."""

    def bind(operands: Operands) -> Bound:
        given = operands[:count]
        return Bound(lambda: function(*given), lambda: (operands.output, operands.output_lse))

    return bind


def _bind_vllm(operands: Operands) -> Bound:
    op, arguments = torch.ops._C.merge_attn_states, vllm.arguments(operands)
    return Bound(lambda: op(*arguments), lambda: (operands.output, operands.output_lse))


def _bind_compiled(operands: Operands) -> Bound:
    torch._dynamo.config.recompile_limit = 1000  # past it dynamo silently runs eagerly
    return _bind(torch.compile(merge_in_pytorch, dynamic=False), 6)(operands)


OURS = Provider("ours", _bind(merge_attn_states.merge_attn_states))
OURS_OPS = Provider("ours_ops", _bind(torch.ops.merge_attn_states.merge_attn_states))
VLLM = Provider("vllm", _bind_vllm, vllm.refuses)
COMPILED = Provider("compile", _bind_compiled)
EAGER = Provider("eager", _bind(merge_in_pytorch, 6))


def prepare(
    providers: Sequence[Provider],
    operands: Sequence[Operands],
    check: Callable[[Bound, Operands], str] = check,
) -> tuple[dict[str, list[Call]], dict[str, str]]:
    """By provider its calls, one a set; or why there are none: who is wrong is not timed."""
    timed: dict[str, list[Call]] = {}
    refused: dict[str, str] = {}
    for provider in providers:
        if reason := provider.refuses(operands[0]):
            refused[provider.name] = f"not supported: {reason}"
            continue
        try:
            bound = [provider.bind(one) for one in operands]
            wrong = check(bound[0], operands[0]) or check(bound[-1], operands[-1])
        except Exception as error:  # whatever another project's code raises is its answer
            if provider.name.startswith("ours"):
                raise
            refused[provider.name] = f"failed: {type(error).__name__}: {str(error).splitlines()[0]}"
            continue
        if wrong:
            refused[provider.name] = f"wrong: {wrong}"
        else:
            timed[provider.name] = [one.call for one in bound]
    return timed, refused
