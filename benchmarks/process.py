"""One process of a run, which measures groups, and how several are run and joined.

Processes differ by more than rounds do (where memory lies, which rhythm launches fall into), so a
run starts several: what each of them says is kept, and compared within it (results.py).
"""

import argparse
import importlib.util
import multiprocessing
import statistics
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from typing import Any, TypeVar

import torch

from . import cold, cpu, host, neighbours, options, ranks, states, vllm
from .cases import GROUPS, RANKS, is_compared_with_pytorch
from .providers import COMPILED, EAGER, OURS, VLLM
from .results import Record
from .states_cases import GROUPS as STATES_GROUPS

Answer = TypeVar("Answer")
Measured = tuple[dict[str, list[Record]], dict[str, str]]


def in_processes(function: Callable[..., Answer], given: Sequence[Any], count: int) -> list[Answer]:
    """What a function returns in so many processes, each begun for it, one after the other."""
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, spawn, max_tasks_per_child=1) as pool:
        return [pool.submit(function, *given).result() for _ in range(count)]


def joined(processes: Sequence[Sequence[Record]]) -> list[Record]:
    """One record a case: each provider's microseconds, one a process.

    Of the plain kernels only the best is kept, as "limit".
    """
    merged = []
    for records in zip(*processes, strict=True):
        times = [record["us"] for record in records]
        us = {name: [round(us[name], 3) for us in times if name in us] for name in times[0]}
        plain = {name: us.pop(name) for name in [*us] if name.startswith("plain, ")}
        made = dict(records[0])
        if plain:
            best = min(plain, key=lambda name: statistics.median(plain[name]))
            us["limit"] = plain[best]
            made["limit"] = best.removeprefix("plain, ")
        refused = {name: why for record in records for name, why in record["refused"].items()}
        merged.append(made | {"us": us, "refused": refused})
    return merged


def measure_group(group: str, chosen: argparse.Namespace, missing: dict[str, str]) -> list[Record]:
    """Measure one group in this process."""
    device, rounds = chosen.device, chosen.rounds
    if group == "host":
        return host.measure(device, missing, rounds)
    if group == RANKS:
        return ranks.measure(chosen, missing)
    cases = [case for case in GROUPS.get(group, []) if chosen.case in case.name]
    many = [case for case in STATES_GROUPS.get(group, []) if chosen.case in case.name]
    if group == "cpu":
        processor = torch.device("cpu")
        of_many = [states.measure(case, states.ON_A_CPU, processor, rounds) for case in many]
        return [*(cpu.measure(case, rounds) for case in cases), *of_many]
    if group == "states":
        asked = [one for one in states.PROVIDERS if one.name not in missing]
        return [states.measure(case, asked, device, rounds) for case in many]
    who = [OURS] if "vllm" in missing else [OURS, VLLM]
    if group == "cold":
        return [cold.measure(case, who, device, rounds) for case in cases]
    wanted = [[*who, COMPILED, EAGER] if is_compared_with_pytorch(case) else who for case in cases]
    return [neighbours.measure(*one, device, rounds) for one in zip(cases, wanted, strict=True)]


def measure(chosen: argparse.Namespace) -> Measured:
    """One process's records by group; and who is missing, and why."""
    missing = {"vllm": "measured on a GPU only"}
    if chosen.device.type == "cuda":
        torch.cuda.set_device(chosen.device.index or 0)
        why = vllm.load(chosen.vllm_op_library)
        missing = {"vllm": why} if why else {}
    if importlib.util.find_spec("flashinfer") is None:
        missing["flashinfer"] = "not installed"
    groups = options.groups(chosen)
    return {group: measure_group(group, chosen, missing) for group in groups}, missing
