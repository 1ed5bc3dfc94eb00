"""What the plugin gains at vLLM's dispatcher: `python -m in_vllm.gain --output FILE`.

A call as each backend makes it (patterns.py), through the real dispatcher with and without the
plugin, in turn in one process. Host: an eager call's microseconds, launch included, in a tight loop
and swept, the best of three processes. Device: what the kernel adds between neighbours, and cold.
Nobody whose answer is wrong is timed. vLLM must be importable; on a CPU the host's times are all
there is, and the dispatcher's own branch for it runs.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib
import sys
import timeit
from collections.abc import Iterator
from functools import partial

import torch

from benchmarks import environment, options, vllm
from benchmarks.check import check
from benchmarks.host import Times, tight_and_swept
from benchmarks.neighbours import added, neighbours
from benchmarks.operands import Operands
from benchmarks.process import in_processes
from benchmarks.results import Record, Results
from benchmarks.run import PROCESSES
from benchmarks.timing import ROUNDS, TimedCalls, Timing, buffer_sets, time_cuda
from merge_attn_states.integrations import vllm as plugin

from .dispatcher import OPS, Merge, patched, unpatched
from .patterns import PATTERNS, TOKENS, Pattern
from .records import best_of, rounded

HOST_TOKENS = 16
Merges = dict[str, Merge]  # the dispatcher with and without the plugin, by provider


@contextlib.contextmanager
def both() -> Iterator[Merges]:
    """Both dispatchers at once: the patched one does not ask for vLLM's op.

    Raises
    ------
    SystemExit
        vLLM cannot be imported, the plugin is not used, or one of its calls went back to vLLM.
    """
    try:
        patched()
    except ImportError as error:
        raise SystemExit(f"benchmarks: vLLM cannot be imported: {error}") from error
    plugin.register()
    if not plugin.status().active:
        raise SystemExit(f"benchmarks: the plugin is not used: {plugin.status().reason}")
    with unpatched() as own:
        yield {"ours": patched(), "vllm": own}
    if fallbacks := plugin.status().fallbacks:
        raise SystemExit(f"benchmarks: calls went back to vLLM, none is timed: {fallbacks}")


def check_own_way(device: torch.device) -> None:
    """Check that vLLM goes its own way on this device: one that lacks a file takes Triton for all.

    Raises
    ------
    SystemExit
        It takes the platform for another one, or its op is not registered.
    """
    platform = importlib.import_module("vllm.platforms").current_platform
    importlib.import_module(OPS)
    on_gpu = platform.is_cuda() and hasattr(torch.ops._C, "merge_attn_states")
    if not (on_gpu if device.type == "cuda" else platform.is_cpu()):
        raise SystemExit(
            f"benchmarks: this vLLM does not go its own way on {device.type}: its platform is "
            f"{type(platform).__name__}; a file of its wheel may be missing, and on a CPU "
            "VLLM_TARGET_DEVICE=cpu is needed"
        )


def statement(pattern: Pattern, operands: Operands) -> str:
    """The call as its caller writes it."""
    names = [name for name, value in operands._asdict().items() if value is not None]
    last = operands._fields.index(names[-1]) + 1
    if pattern.by_keyword:
        return f"merge({', '.join(f'{name}={name}' for name in names)})"
    return f"merge({', '.join(operands._fields[:last])})"


def refusal(pattern: Pattern, operands: Operands, merge: Merge) -> Record:
    """Why a provider is not timed, as fields of its record; empty where its answer is right."""
    try:
        reason = check(partial(pattern.call, merge, operands), operands)
        return {"status": "wrong", "reason": reason} if reason else {}
    except Exception as error:  # whatever another project's code raises is its answer
        if merge is patched():
            raise
        reason = f"{type(error).__name__}: {str(error).splitlines()[0]}"
        return {"status": "failed", "reason": reason}


def host_times(device: torch.device, quick: bool) -> dict[str, Times]:
    """One process's, by pattern."""
    check_own_way(device)
    with both() as merges:
        return time_host_here(merges, device, quick)


def time_host_here(merges: Merges, device: torch.device, quick: bool) -> dict[str, Times]:
    times = {}
    for pattern in PATTERNS:
        operands = pattern.make(HOST_TOKENS, device)
        text = statement(pattern, operands)
        # The set-up reads the clock once: its code is then in the caches whatever was swept.
        timed: TimedCalls = {
            provider: timeit.Timer(
                text, "_timer()", globals=operands._asdict() | {"merge": merge}
            ).timeit
            for provider, merge in merges.items()
            if not refusal(pattern, operands, merge)
        }
        times[pattern.name] = tight_and_swept(timed, device, 1 if quick else ROUNDS)
    return times


def measure_host(merges: Merges, device: torch.device, quick: bool) -> Iterator[Record]:
    processes = in_processes(host_times, [device, quick], 1 if quick else PROCESSES)
    for pattern in PATTERNS:
        operands = pattern.make(HOST_TOKENS, device)
        case = {"group": "host", "case": pattern.name, "tokens": HOST_TOKENS}
        case["statement"] = statement(pattern, operands)
        for record in best_of([process[pattern.name] for process in processes]):
            yield case | record
        if refused := refusal(pattern, operands, merges["vllm"]):
            for regime in processes[0][pattern.name]:
                yield case | {"regime": regime, "provider": "vllm"} | refused


def measure_device(merges: Merges, device: torch.device, quick: bool) -> Iterator[Record]:
    for pattern in PATTERNS:
        for tokens in TOKENS[:1] if quick else TOKENS:
            for regime in ("neighbours", "cold"):
                yield from time_device(merges, pattern, tokens, regime, device)


def time_device(
    merges: Merges, pattern: Pattern, tokens: int, regime: str, device: torch.device
) -> Iterator[Record]:
    """A record for each provider; its status and the reason where its answer is wrong."""
    one = pattern.make(tokens, device)
    refusals = {provider: refusal(pattern, one, merge) for provider, merge in merges.items()}
    right = {name: merge for name, merge in merges.items() if not refusals[name]}
    if regime == "neighbours":
        calls = {name: partial(pattern.call, merge, one) for name, merge in right.items()}
        timings = {
            name: Timing(us, us, us) for name, us in added(neighbours(one), calls, ROUNDS).items()
        }
    else:
        touched = {id(t): t.nbytes for t in one if isinstance(t, torch.Tensor)}
        sets = buffer_sets(sum(touched.values()), device)
        operands = [one, *(pattern.make(tokens, device) for _ in range(sets - 1))]
        timings = time_cuda(
            {
                name: [partial(pattern.call, merge, each) for each in operands]
                for name, merge in right.items()
            }
        )
    for provider, refused in refusals.items():
        record = {"group": "device", "case": f"{pattern.name}, {tokens} tokens", "regime": regime}
        record |= {"pattern": pattern.name, "tokens": tokens, "provider": provider}
        yield record | (refused or rounded(timings[provider]))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_results(parser)
    options.add_device(parser)
    parser.add_argument("--quick", action="store_true", help="does everything run?")
    chosen = parser.parse_args(arguments)
    device: torch.device = chosen.device
    check_own_way(device)
    with both() as merges:
        measure(merges, device, chosen)
    return 0


def measure(merges: Merges, device: torch.device, chosen: argparse.Namespace) -> None:
    sources = environment.sources(chosen.commit)
    here = environment.identity(device, sources)
    here |= {"vllm": vllm.version(), "quick": chosen.quick}
    results = Results(here)
    groups = {"host": measure_host} | ({"device": measure_device} if device.type == "cuda" else {})
    for group, measured in groups.items():
        records = list(measured(merges, device, chosen.quick))
        results.add(group, environment.circumstances(device, sources["commit"]), records)
        for record in records:
            figure = record.get("median_us", record.get("reason"))
            print(record["case"], record["regime"], record["provider"], figure, sep="  ")
    if chosen.output:
        results.save(chosen.output)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
