"""What the plugin gains at vLLM's dispatcher: `python -m benchmarks.in_vllm.gain --output FILE`.

A call as each backend makes it (patterns.py), through the real dispatcher with and without the
plugin, in turn in one process. Host: an eager call's microseconds, launch included, in a tight loop
and swept, the best of three processes. Device: the kernel's, by CUDA graph replay, cold and warm.
Nobody whose answer is wrong is timed. vLLM must be importable; on a CPU the dispatcher's own branch
for it runs, and the calls are timed by the clock.
"""

from __future__ import annotations

import argparse
import json
import sys
import timeit
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import torch

from merge_attn_states.integrations import vllm as plugin

from .. import environment, vllm
from ..check import check
from ..host import PROCESSES, Times, best_of, run_processes, tight_and_swept
from ..measure import Record, rounded
from ..operands import Operands
from ..providers import Bound
from ..results import Results
from ..timing import ROUNDS, TimedCalls, buffer_sets, time_cpu, time_cuda
from .dispatcher import PROVIDERS, patched
from .patterns import PATTERNS, TOKENS, Pattern

HOST_TOKENS = 16


def load() -> None:
    """Import vLLM, and put the plugin in as vLLM does."""
    try:
        patched()
    except ImportError as error:
        raise SystemExit(f"benchmarks: vLLM cannot be imported: {error}") from error
    plugin.register()
    if not plugin.status().active:
        raise SystemExit(f"benchmarks: the plugin is not used: {plugin.status().reason}")


def statement(pattern: Pattern, operands: Operands) -> str:
    """The call as its caller writes it."""
    names = [name for name, value in operands._asdict().items() if value is not None]
    last = operands._fields.index(names[-1]) + 1
    if pattern.by_keyword:
        return f"merge({', '.join(f'{name}={name}' for name in names)})"
    return f"merge({', '.join(operands._fields[:last])})"


def refusal(pattern: Pattern, operands: Operands, provider: str) -> Record:
    """Why a provider is not timed, as fields of its record; empty where its answer is right."""
    try:
        with PROVIDERS[provider]() as merge:
            answer = operands.output, operands.output_lse
            call = Bound(partial(pattern.call, merge, operands), lambda: answer)
            reason = check(call, operands)
            return {"status": "wrong", "reason": reason} if reason else {}
    except Exception as error:  # whatever another project's code raises is its answer
        if provider == "ours":
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return {"status": "failed", "reason": reason}


def time_host_here(device: torch.device, quick: bool) -> dict[str, Times]:
    """One process's times, by pattern."""
    times = {}
    for pattern in PATTERNS:
        operands = pattern.make(HOST_TOKENS, device)
        text = statement(pattern, operands)
        timed: dict[str, TimedCalls] = {}
        for provider, around in PROVIDERS.items():
            if refusal(pattern, operands, provider):
                continue
            with around() as merge:
                run = timeit.Timer(text, "_timer()", globals=operands._asdict() | {"merge": merge})

            def timed_calls(count: int, around: Any = around, run: timeit.Timer = run) -> float:
                with around():
                    return run.timeit(count)

            timed[provider] = timed_calls
        times[pattern.name] = tight_and_swept(timed, device, quick)
    return times


def time_device(
    pattern: Pattern, tokens: int, regime: str, device: torch.device, rounds: int
) -> Iterator[Record]:
    """A record for each provider; its status and the reason where its answer is wrong."""
    one = pattern.make(tokens, device)
    touched = {id(t): t.numel() * t.element_size() for t in one if isinstance(t, torch.Tensor)}
    sets = 1 if regime == "warm" else buffer_sets(sum(touched.values()), device)
    operands = [one, *(pattern.make(tokens, device) for _ in range(sets - 1))]

    def call(provider: str, operands: Operands) -> None:
        with PROVIDERS[provider]() as merge:
            pattern.call(merge, operands)

    refusals = {provider: refusal(pattern, one, provider) for provider in PROVIDERS}
    timer = time_cuda if device.type == "cuda" else time_cpu
    timings = timer(
        {
            provider: [partial(call, provider, each) for each in operands]
            for provider, refused in refusals.items()
            if not refused
        },
        rounds,
    )
    for provider, refused in refusals.items():
        record = {"case": f"{pattern.name}, {tokens} tokens", "regime": regime}
        record |= {"pattern": pattern.name, "tokens": tokens, "provider": provider}
        yield record | (refused or rounded(timings[provider]))


def measure_host(device: torch.device, quick: bool) -> Iterator[Record]:
    arguments = ["--host-process", "--device", str(device), *(["--quick"] if quick else [])]
    module = "benchmarks.in_vllm.gain"
    processes = run_processes(module, arguments, 1 if quick else PROCESSES)
    for pattern in PATTERNS:
        operands = pattern.make(HOST_TOKENS, device)
        case = {"case": pattern.name, "tokens": HOST_TOKENS}
        case["statement"] = statement(pattern, operands)
        for record in best_of([process[pattern.name] for process in processes]):
            yield case | record
        if refused := refusal(pattern, operands, "vllm"):
            for regime in processes[0][pattern.name]:
                yield case | {"regime": regime, "provider": "vllm"} | refused


def measure_device(device: torch.device, quick: bool) -> Iterator[Record]:
    for pattern in PATTERNS:
        for tokens in TOKENS[:1] if quick else TOKENS:
            for regime in ("cold", "warm"):
                yield from time_device(pattern, tokens, regime, device, 1 if quick else ROUNDS)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON results")
    parser.add_argument("--source-trees", metavar="csrc=HASH,python=HASH,commit=HASH")
    parser.add_argument("--host-process", action="store_true", help=argparse.SUPPRESS)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", type=torch.device, default=torch.device(default))
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    options = parser.parse_args(arguments)
    device: torch.device = options.device
    load()
    if options.host_process:
        print(json.dumps(time_host_here(device, options.quick)))
        return 0
    trees = environment.source_trees(options.source_trees)
    here = environment.identity(device, trees, None, None)
    here |= {"vllm": vllm.version(), "quick": options.quick}
    results = Results(here)
    for group, measure in {"host": measure_host, "device": measure_device}.items():
        records = [{"group": group} | record for record in measure(device, options.quick)]
        results.add(group, here, environment.circumstances(device, trees["commit"]), records)
        if options.output:
            results.save(options.output)
        for record in records:
            figure = record.get("median_us", record.get("reason"))
            print(record["case"], record["regime"], record["provider"], figure, sep="  ")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
