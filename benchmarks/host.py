"""What an eager call costs the host, launch included: `python -m benchmarks.host` is one process.

Every provider is a statement as a user writes it, timed in a tight loop and, as inside an engine,
one call at a time with 16 MB of memory touched before it. Processes differ by a fifth: three run
one after the other, and of each provider the best process counts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import subprocess
import sys
import timeit
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

import merge_attn_states

from . import vllm
from .cases import HOST_CASE
from .check import check
from .measure import Record, rounded
from .native import library
from .operands import Operands, make_operands
from .providers import Bound
from .timing import TimedCalls, Timing, time_host

PROCESSES = 3
SWEPT_BYTES = 16 * 2**20
LINE = 64
BLOCKS, THREADS = 4, 128  # of a bare launch: what tuning.h gives HOST_CASE
POSITIONAL = "output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse"
KEYWORDS = ", ".join(f"{name}={name}" for name in POSITIONAL.split(", "))

Times = dict[str, dict[str, Timing]]  # regime: {provider: microseconds}


def statements(device: torch.device, missing: dict[str, str]) -> dict[str, str]:
    """What is timed, by provider."""
    calls = {
        "ours": f"merge({POSITIONAL})",
        "ours_keyword": f"merge({KEYWORDS})",
        "ours_ops": f"op({POSITIONAL})",
        "add": "torch.add(prefix_output, suffix_output, out=output)",
    }
    if device.type == "cuda" and "vllm" not in missing:
        calls["vllm"] = f"vllm_op({', '.join(vllm.argument_names())})"
        if vllm.dispatcher() is not None:
            calls["vllm_dispatcher"] = f"vllm_merge({POSITIONAL})"
    return calls


def _timed_calls(device: torch.device, missing: dict[str, str]) -> dict[str, TimedCalls]:
    operands: Operands = make_operands(HOST_CASE, 1, device)[0]
    names: dict[str, Any] = operands._asdict() | {
        "torch": torch,
        "merge": merge_attn_states.merge_attn_states,
        "op": torch.ops.merge_attn_states.merge_attn_states,
    }
    if device.type == "cuda" and "vllm" not in missing:
        names |= {"vllm_op": torch.ops._C.merge_attn_states, "vllm_merge": vllm.dispatcher()}
    asked = statements(device, missing)
    for provider, statement in asked.items():
        run = partial(exec, statement, names)
        bound = Bound(run, lambda: (operands.output, operands.output_lse))
        if provider != "add" and (reason := check(bound, operands)):
            raise SystemExit(f"{provider}: {statement}: {reason}")
    # The set-up reads the clock once: its code is then in the caches whatever was swept.
    timed: dict[str, TimedCalls] = {
        provider: timeit.Timer(statement, "_timer()", globals=names).timeit
        for provider, statement in asked.items()
    }
    if device.type == "cuda":
        timed["bare_launch"] = _bare_launches()
    return timed


def _bare_launches() -> TimedCalls:
    launches = library("bare_launch").bare_launch_seconds
    launches.argtypes = [ctypes.c_int, ctypes.c_int, ctypes.c_int, ctypes.c_void_p]
    launches.restype = ctypes.c_double

    def timed(count: int) -> float:
        stream = torch.cuda.current_stream().cuda_stream
        seconds: float = launches(count, BLOCKS, THREADS, stream)
        if seconds < 0:
            raise RuntimeError(f"bare launch: CUDA error {-seconds:.0f}")
        return seconds

    return timed


def _sweep() -> Callable[[], None]:
    """Write to every cache line of 16 MB, by as little code as Python has for it."""
    memory, values = bytearray(SWEPT_BYTES), bytearray(SWEPT_BYTES // LINE)

    def sweep() -> None:
        memory[::LINE] = values

    return sweep


def tight_and_swept(timed: dict[str, TimedCalls], device: torch.device, quick: bool) -> Times:
    """One process's times."""
    torch.set_num_threads(1)
    sweep = _sweep()

    def synchronize() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize()

    def sweep_idle() -> None:
        synchronize()
        sweep()

    for run in timed.values():
        run(100)
    calls, tight_rounds, swept_rounds = (20, 3, 3) if quick else (1000, 31, 300)
    return {
        "tight": time_host(timed, calls, tight_rounds, synchronize),
        "swept": time_host(timed, 1, swept_rounds, sweep_idle),
    }


def run_processes(
    module: str, arguments: list[str], count: int, first_on_path: Path | None = None
) -> list[Any]:
    """What a module prints as its last line, in JSON, from processes one after the other."""
    paths = [str(first_on_path or ""), *sys.path]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(filter(None, paths))}
    command = [sys.executable, "-m", module, *arguments]
    answers = []
    for _ in range(count):
        ran = subprocess.run(command, capture_output=True, text=True, check=False, env=environment)
        if ran.returncode:
            raise SystemExit(f"{module} failed:\n{ran.stderr}")
        answers.append(json.loads(ran.stdout.splitlines()[-1]))
    return answers


def best_of(processes: list[Times]) -> Iterator[Record]:
    """A record for each regime and provider: its best process, and the medians of all."""
    for regime in processes[0]:
        for provider in processes[0][regime]:
            timings = [Timing(*process[regime][provider]) for process in processes]
            medians = [rounded(timing)["median_us"] for timing in timings]
            record = {"regime": regime, "provider": provider, **rounded(min(timings))}
            yield record | {"processes": medians}


def measure_host(
    device: torch.device, missing: dict[str, str], op_library: str | None, quick: bool
) -> list[Record]:
    """Run the processes and record the best of each provider."""
    arguments = ["--device", str(device), "--missing", json.dumps(missing)]
    arguments += ["--vllm-op-library", op_library] if op_library else []
    arguments += ["--quick"] if quick else []
    processes = run_processes("benchmarks.host", arguments, 1 if quick else PROCESSES)
    case, texts = HOST_CASE.record(), statements(device, missing)
    records: list[Record] = []
    for record in best_of(processes):
        text = texts.get(record["provider"])
        records.append({"group": "host"} | case | record | ({"statement": text} if text else {}))
    for provider in {"vllm", "vllm_dispatcher"} - set(texts) if device.type == "cuda" else ():
        reason = missing.get("vllm", "this release's op has other arguments")
        refused = {"provider": provider, "status": "not supported", "reason": reason}
        records += [{"group": "host"} | case | {"regime": r} | refused for r in processes[0]]
    return records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--missing", type=json.loads, default={})
    parser.add_argument("--vllm-op-library")
    parser.add_argument("--quick", action="store_true")
    options = parser.parse_args()
    if options.device.type == "cuda" and "vllm" not in options.missing:
        vllm.load(options.vllm_op_library)
    timed = _timed_calls(options.device, options.missing)
    print(json.dumps(tight_and_swept(timed, options.device, options.quick)))


if __name__ == "__main__":
    main()
