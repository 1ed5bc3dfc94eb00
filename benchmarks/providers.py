"""Who is measured, and what each of them cannot do."""

from __future__ import annotations

import importlib
import importlib.metadata
import math
from collections.abc import Callable
from typing import NamedTuple

import torch

import merge_attn_states

from . import vllm
from .cases import COMPILED, Case
from .formula import merge_in_pytorch
from .operands import Operands
from .timing import Call

TITLES = {  # in the order of tables and legends
    "ours": "merge_attn_states",
    "ours_keyword": "merge_attn_states, by keyword",
    "ours_ops": "merge_attn_states, torch.ops",
    "vllm": "vLLM",
    "vllm_dispatcher": "vLLM, behind its dispatcher",
    "flashinfer": "FlashInfer",
    "compile": "torch.compile",
    "eager": "PyTorch eager",
    "add": "torch.add(out=)",
    "triad": "triad",
    "bare_launch": "bare launch, C loop",
}


class Bound(NamedTuple):
    """A provider bound to one set of operands."""

    call: Call
    answer: Callable[[], tuple[torch.Tensor, torch.Tensor]]  # after a call: output, output_lse


def _everything(group: str, case: Case) -> bool:
    return True


class Provider(NamedTuple):
    """`refuses` says why a case cannot be given to it, empty where it can."""

    name: str
    refuses: Callable[[Case, Operands], str]
    bind: Callable[[Operands], Bound]
    is_asked: Callable[[str, Case], bool] = _everything


def _in_place_answer(operands: Operands) -> Callable[[], tuple[torch.Tensor, torch.Tensor]]:
    return lambda: (operands.output, operands.output_lse)


def _refuses_nothing(case: Case, operands: Operands) -> str:
    return ""


def _refuses_formula(case: Case, operands: Operands) -> str:
    if case.context_tokens is not None:
        return "the formula merges every token"
    if case.output_dtype or case.torch_dtype.itemsize == 1:
        return "the formula has no FP8"
    return ""


def _refuses_flashinfer(case: Case, operands: Operands) -> str:
    if case.context_tokens is not None or case.in_place:
        return "merge_state has no context count and makes new outputs"
    if case.output_dtype or case.torch_dtype not in (torch.float16, torch.bfloat16):
        return f"no {case.output_dtype or case.dtype}"
    if not all(rows.is_contiguous() for rows in (operands.prefix_output, operands.suffix_output)):
        return "needs contiguous parts"
    pack = max(8, case.head_size // 32)
    if case.heads * (case.head_size // pack) > 1024:
        return "more than 1,024 threads a block"
    return ""


def _bind_whole(function: Callable[..., object]) -> Callable[[Operands], Bound]:
    def bind(operands: Operands) -> Bound:
        return Bound(lambda: function(*operands), _in_place_answer(operands))

    return bind


def _bind_formula(function: Callable[..., None]) -> Callable[[Operands], Bound]:
    def bind(operands: Operands) -> Bound:
        tensors = operands[:6]
        return Bound(lambda: function(*tensors), _in_place_answer(operands))

    return bind


def _bind_vllm(operands: Operands) -> Bound:
    op, arguments = torch.ops._C.merge_attn_states, vllm.arguments(operands)
    return Bound(lambda: op(*arguments), _in_place_answer(operands))


def _bind_flashinfer(operands: Operands) -> Bound:
    """Its LSEs are [N, H] in base 2; its outputs are new, and kept so that they rotate too."""
    merge_state = importlib.import_module("flashinfer").merge_state
    prefix_lse, suffix_lse = (
        (lse.T / math.log(2)).contiguous() for lse in (operands.prefix_lse, operands.suffix_lse)
    )
    kept: list[tuple[torch.Tensor, torch.Tensor]] = []

    def call() -> None:
        made = merge_state(operands.prefix_output, prefix_lse, operands.suffix_output, suffix_lse)
        kept[:] = [made]

    return Bound(call, lambda: (kept[0][0], kept[0][1].T * math.log(2)))


def flashinfer_version() -> tuple[str | None, str]:
    """Its version, or None and why it is not there."""
    try:
        importlib.import_module("flashinfer").merge_state  # noqa: B018
        return importlib.metadata.version("flashinfer-python"), ""
    except (ImportError, OSError, AttributeError) as error:
        return None, str(error).splitlines()[0]


def missing_providers(device: torch.device, vllm_op_library: str | None) -> dict[str, str]:
    """Who cannot be had on this machine at all, and why."""
    if device.type == "cpu":
        return dict.fromkeys(("vllm", "flashinfer"), "measured on a GPU only")
    absent = {"vllm": vllm.load(vllm_op_library), "flashinfer": flashinfer_version()[1]}
    return {name: why for name, why in absent.items() if why}


def _bind_compiled(operands: Operands) -> Bound:
    torch._dynamo.config.recompile_limit = 1000  # past it dynamo silently runs eagerly
    return _bind_formula(torch.compile(merge_in_pytorch, dynamic=False))(operands)


def providers(missing: dict[str, str]) -> list[Provider]:
    """Everyone who is not missing, ours first."""
    ours, ours_ops = (
        _bind_whole(merge_attn_states.merge_attn_states),
        _bind_whole(torch.ops.merge_attn_states.merge_attn_states),
    )
    everyone = [
        Provider("ours", _refuses_nothing, ours),
        # In a graph its kernel is the same; groups without large operands show that.
        Provider("ours_ops", _refuses_nothing, ours_ops, lambda g, _: g in ("small", "cpu")),
        Provider("vllm", lambda _, operands: vllm.refuses(operands), _bind_vllm),
        Provider("flashinfer", _refuses_flashinfer, _bind_flashinfer),
        Provider("eager", _refuses_formula, _bind_formula(merge_in_pytorch)),
        Provider(
            "compile",
            _refuses_formula,
            _bind_compiled,
            lambda group, case: (group, case.name) in COMPILED,
        ),
    ]
    return [provider for provider in everyone if provider.name not in missing]
