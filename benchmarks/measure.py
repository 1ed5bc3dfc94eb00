"""One comparison: its operands, a check of every provider's answer, the times, the records."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import merge_attn_states

from .cases import Case, Comparison
from .check import check
from .operands import Operands, make_operands, vary
from .providers import Provider
from .timing import Call, Timing, buffer_sets, time_cpu, time_cuda
from .triad import triad, triad_buffers

Record = dict[str, Any]


def rounded(timing: Timing) -> Record:
    """The times as JSON fields, with as many digits as a clock gives."""
    names = ("median_us", "low_us", "high_us")
    return {name: float(f"{value:.4g}") for name, value in zip(names, timing, strict=True)}


def measure(
    group: str,
    comparison: Comparison,
    providers: list[Provider],
    device: torch.device,
    rounds: int,
    most_sets: int | None = None,
) -> list[Record]:
    """Time every provider on every case of a comparison, in turn; a record for each."""
    sets = 1
    if comparison[0].regime == "cold":
        sets = buffer_sets(min(case.footprint for case in comparison), device)
        sets = min(sets, most_sets or sets)
    shared = make_operands(comparison[0], sets, device)
    records: list[Record] = []
    timed: dict[str, list[Call]] = {}

    def record(case: Case, provider: str, **more: Any) -> Record:
        made = {"group": group} | case.record() | {"provider": provider} | more
        records.append(made)
        return made

    waiting: dict[str, Record] = {}
    for case in comparison:
        operands = [vary(one, case) for one in shared]
        for provider in providers:
            if not provider.is_asked(group, case):
                continue
            calls, status, reason = _prepare(provider, case, operands)
            if status:
                record(case, provider.name, status=status, reason=reason)
                continue
            kernel = {}
            if provider.name == "ours":
                kernel = merge_attn_states.selected_kernel(*operands[0])._asdict()
            key = f"{case.name}: {provider.name}"
            timed[key] = calls
            waiting[key] = record(case, provider.name, **kernel)
        name, moved, calls = _ceiling(case, sets, device)
        key = f"{case.name}: {name}"
        timed[key] = calls
        waiting[key] = record(case, name, bytes=moved)

    timer = time_cuda if device.type == "cuda" else time_cpu
    for key, timing in timer(timed, rounds).items():
        waiting[key].update(rounded(timing))
    return records


def _prepare(
    provider: Provider, case: Case, operands: list[Operands]
) -> tuple[list[Call], str, str]:
    """A provider's calls, one a set; or none, its status and the reason."""
    if reason := provider.refuses(case, operands[0]):
        return [], "not supported", reason
    try:
        bound = [provider.bind(one) for one in operands]
        for i in {0, len(bound) - 1}:
            if reason := check(bound[i], operands[i]):
                return [], "wrong", reason
    except Exception as error:  # whatever another project's code raises is its answer
        if provider.name.startswith("ours"):
            raise
        return [], "failed", f"{type(error).__name__}: {str(error).splitlines()[0]}"
    return [one.call for one in bound], "", ""


def _ceiling(case: Case, sets: int, device: torch.device) -> tuple[str, int, list[Call]]:
    """What bounds a case: its name, the bytes it moves, and its calls."""
    calls: list[Callable[[], object]]
    if device.type == "cuda":
        narrow = case.torch_output_dtype.itemsize < case.torch_dtype.itemsize
        buffers = triad_buffers(case.bytes, narrow, sets, device)
        moved = sum(buffer.numel() for buffer in buffers[0])
        return "triad", moved, [partial(triad, *three) for three in buffers]
    dtype = case.torch_dtype if case.torch_dtype.itemsize > 1 else torch.bfloat16
    parts = torch.randn(3, case.tokens, case.heads, case.head_size).to(dtype)
    calls = [partial(torch.add, parts[0], parts[1], out=parts[2])] * sets
    return "add", parts.numel() * parts.element_size(), calls
