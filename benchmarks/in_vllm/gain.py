"""What the plugin gains at vLLM's dispatcher: `python -m benchmarks.in_vllm.gain --output FILE`.

A call as each backend makes it (patterns.py), through the real dispatcher with and without the
plugin, in turn in one process. Host: an eager call's microseconds, launch included, in a tight loop
and swept, the best of three processes. Device: the kernel's, by CUDA graph replay, cold and warm.
Nobody whose answer is wrong is timed. vLLM's Python package and its op library must be importable,
and a GPU there.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
import timeit
from collections.abc import Callable, Iterator
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
from ..timing import TimedCalls, buffer_sets, time_cuda
from .dispatcher import Merge, patched, unpatched
from .patterns import PATTERNS, TOKENS, Pattern

HOST_TOKENS = 16
DEVICE = torch.device("cuda")


def merges() -> dict[str, Callable[[], contextlib.AbstractContextManager[Merge]]]:
    """The dispatcher with and without the plugin, each for as long as it is used."""
    return {"ours": lambda: contextlib.nullcontext(patched()), "vllm": unpatched}


def load() -> None:
    """Import vLLM, and put the plugin in as vLLM does."""
    if why := vllm.load(None):
        raise SystemExit(f"benchmarks: vLLM's op is not there: {why}")
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


def wrong(pattern: Pattern, operands: Operands, provider: str) -> str:
    """What is wrong with a provider's answer, or why there is none; empty where it is right."""
    try:
        with merges()[provider]() as merge:
            answer = operands.output, operands.output_lse
            return check(Bound(partial(pattern.call, merge, operands), lambda: answer), operands)
    except Exception as error:  # whatever another project's code raises is its answer
        if provider == "ours":
            raise
        return f"{type(error).__name__}: {str(error).splitlines()[0]}"


def time_host_here(quick: bool) -> dict[str, Times]:
    """One process's times, by pattern."""
    times = {}
    for pattern in PATTERNS:
        operands = pattern.make(HOST_TOKENS, DEVICE)
        text = statement(pattern, operands)
        timed: dict[str, TimedCalls] = {}
        for provider, around in merges().items():
            if wrong(pattern, operands, provider):
                continue
            with around() as merge:
                run = timeit.Timer(text, "_timer()", globals=operands._asdict() | {"merge": merge})

            def timed_calls(count: int, around: Any = around, run: timeit.Timer = run) -> float:
                with around():
                    return run.timeit(count)

            timed[provider] = timed_calls
        times[pattern.name] = tight_and_swept(timed, DEVICE, quick)
    return times


def time_device(pattern: Pattern, tokens: int, regime: str) -> Iterator[Record]:
    """A record for each provider; its status and the reason where its answer is wrong."""
    one = pattern.make(tokens, DEVICE)
    touched = {id(t): t.numel() * t.element_size() for t in one if isinstance(t, torch.Tensor)}
    sets = 1 if regime == "warm" else buffer_sets(sum(touched.values()), DEVICE)
    operands = [one, *(pattern.make(tokens, DEVICE) for _ in range(sets - 1))]

    def call(provider: str, operands: Operands) -> None:
        with merges()[provider]() as merge:
            pattern.call(merge, operands)

    reasons = {provider: wrong(pattern, one, provider) for provider in merges()}
    timings = time_cuda(
        {
            provider: [partial(call, provider, each) for each in operands]
            for provider, reason in reasons.items()
            if not reason
        }
    )
    for provider, reason in reasons.items():
        record = {"case": f"{pattern.name}, {tokens} tokens", "regime": regime}
        record |= {"pattern": pattern.name, "tokens": tokens, "provider": provider}
        if reason:
            yield record | {"status": "wrong", "reason": reason}
        else:
            yield record | rounded(timings[provider])


def measure() -> Iterator[Record]:
    """Records of the groups host and device."""
    processes = run_processes("benchmarks.in_vllm.gain", ["--host-process"], PROCESSES)
    for pattern in PATTERNS:
        operands = pattern.make(HOST_TOKENS, DEVICE)
        case = {
            "group": "host", "case": pattern.name, "tokens": HOST_TOKENS,
            "statement": statement(pattern, operands),
        }  # fmt: skip
        for record in best_of([process[pattern.name] for process in processes]):
            yield case | record
        if reason := wrong(pattern, operands, "vllm"):
            for regime in ("tight", "swept"):
                status = {"provider": "vllm", "status": "wrong", "reason": reason}
                yield case | {"regime": regime} | status
    for pattern in PATTERNS:
        for tokens in TOKENS:
            for regime in ("cold", "warm"):
                for record in time_device(pattern, tokens, regime):
                    yield {"group": "device"} | record


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON results")
    parser.add_argument("--source-trees", metavar="csrc=HASH,python=HASH,commit=HASH")
    parser.add_argument("--host-process", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    load()
    if options.host_process:
        print(json.dumps(time_host_here(quick=False)))
        return
    trees = environment.source_trees(options.source_trees)
    results = Results(environment.identity(DEVICE, trees, None, None))
    records = list(measure())
    run = environment.circumstances(DEVICE, trees["commit"])
    for group in ("host", "device"):
        chosen = [record for record in records if record["group"] == group]
        results.add(group, results.environment, run, chosen)
    if options.output:
        results.save(options.output)
    for record in records:
        figure = record.get("median_us", record.get("reason"))
        print(record["case"], record["regime"], record["provider"], figure, sep="  ")


if __name__ == "__main__":
    sys.exit(main())
