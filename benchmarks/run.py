"""The command that measures: starts the processes, takes their joined, writes the results file."""

import argparse
import time
from typing import Any

import torch

import merge_attn_states

from . import environment, kernels, options
from .cases import RANKS
from .process import in_processes, joined, measure
from .results import Results
from .tables import group_tables, markdown
from .targets import targets_table

PROCESSES = 3


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    options.add_measuring(made)
    options.add_results(made)
    made.add_argument("--vllm-version", metavar="VERSION", help="of --vllm-op-library")
    made.add_argument("--processes", type=options.positive, default=PROCESSES, metavar="COUNT")
    return made


def main(arguments: list[str]) -> int:
    chosen = parser().parse_args(arguments)
    if chosen.output and chosen.case:
        raise SystemExit("benchmarks: --output takes whole groups, --case some of their cases")
    groups, device = options.groups(chosen), chosen.device
    if device.type == "cuda":
        if merge_attn_states.build_info()["cuda"] is None:
            raise SystemExit("benchmarks: merge_attn_states was built without CUDA kernels")
        torch.cuda.set_device(device.index or 0)
        if groups != (RANKS,):
            kernels.library()
    results, commit = open_results(chosen)
    begin = time.monotonic()
    answers = in_processes(measure, [chosen], chosen.processes)
    run = environment.circumstances(device, commit) | {
        "processes": chosen.processes,
        "seconds": round(time.monotonic() - begin),
        "missing": answers[0][1],
    }
    for group in groups:
        results.add(group, run, joined([records[group] for records, _ in answers]))
        for title, table in group_tables(results, group):
            print(f"\n{title}\n{markdown(*table)}")
    if not results.records:
        raise SystemExit(f"benchmarks: --case: no case's name holds {chosen.case!r}")
    if chosen.output:
        results.save(chosen.output)
    print(f"\n{markdown(*targets_table(results))}\n{run}\n{results.environment}")
    return report_failures(results)


def open_results(chosen: argparse.Namespace) -> tuple[Results, str]:
    """Results to merge into, and the commit; refuses before anything is measured."""
    measured: dict[str, Any] = {"trees": {}, "commit": "", "dirty": True}
    if chosen.output:
        measured = environment.sources(chosen.commit)
        if measured["dirty"]:
            raise SystemExit(
                "benchmarks: csrc, include or python are not the commit's, or not what the binary "
                "was built of: commit and build again"
            )
    here = environment.identity(chosen.device, measured, chosen.vllm_version)
    if here["gpu"] and options.groups(chosen) == (RANKS,):
        here["gpu"] = f"{torch.cuda.device_count()} x {here['gpu']}"
    return Results.open(chosen.output, here), measured["commit"]


def report_failures(results: Results) -> int:
    """Say whose answers were wrong; 1 where they were ours."""
    bad = [
        (provider, record["case"], why)
        for record in results.records
        for provider, why in record["refused"].items()
        if not why.startswith("not supported")
    ]
    print("\n".join(map(": ".join, bad)))
    return int(any(provider.startswith("ours") for provider, *_ in bad))
