"""One process of a run: measures groups and prints their records as JSON, its last line.

Processes differ by more than rounds do (where memory lies, which rhythm launches fall into), so a
run starts several: what each of them says is kept, and compared within it (results.py).
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from typing import Any

import torch

from . import cold, cpu, host, neighbours, options, states, vllm
from .cases import GROUPS, is_compared_with_pytorch
from .providers import COMPILED, EAGER, OURS, VLLM
from .results import Record
from .states_cases import GROUPS as STATES_GROUPS


def run_processes(module: str, arguments: Sequence[str], count: int) -> list[Any]:
    """What a module prints as its last line, in JSON, from processes one after the other."""
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    answers = []
    for _ in range(count):
        command = [sys.executable, "-m", module, *arguments]
        ran = subprocess.run(command, stdout=subprocess.PIPE, text=True, env=environment)
        if ran.returncode:
            raise SystemExit(f"benchmarks: a process of {module} failed")
        answers.append(json.loads(ran.stdout.splitlines()[-1]))
    return answers


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


def passed_on(chosen: argparse.Namespace) -> list[str]:
    """The options of a process that measures."""
    given = ["--device", str(chosen.device), "--rounds", str(chosen.rounds), "--case", chosen.case]
    given += ["--only", *options.groups(chosen)]
    given += ["--vllm-op-library", chosen.vllm_op_library] if chosen.vllm_op_library else []
    return given


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    options.add_measuring(parser)
    chosen = parser.parse_args(arguments)
    if chosen.device.type == "cuda":
        torch.cuda.set_device(chosen.device.index or 0)
    missing = {"vllm": "measured on a GPU only"}
    if chosen.device.type == "cuda":
        why = vllm.load(chosen.vllm_op_library)
        missing = {"vllm": why} if why else {}
    if importlib.util.find_spec("flashinfer") is None:
        missing["flashinfer"] = "not installed"
    measured = {}
    for group in options.groups(chosen):
        begin = time.monotonic()
        measured[group] = measure_group(group, chosen, missing)
        print(f"{group}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
    print(json.dumps({"missing": missing, "groups": measured}))


if __name__ == "__main__":
    main(sys.argv[1:])
