"""The command that measures: groups of cases, each merged into the results file when it is done."""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import torch

import merge_attn_states

from . import argument_types, environment, vllm
from .cases import ALL_GROUPS, GROUPS, quick
from .host import measure_host
from .measure import Record, measure
from .native import library
from .progress import Progress
from .providers import missing_providers, providers
from .results import Results, case_title
from .tables import print_groups
from .timing import ROUNDS

DESCRIPTION = """\
Measures the merge against the memory's limit, against other implementations, and on the host.
On a GPU the limit is the triad (triad.cu) over the same bytes in the same run; on the CPU it is
torch.add(out=) of the same dtype. `python -m benchmarks report` publishes results files, and
`python -m benchmarks targets FILE` compares one with what we ask of ourselves."""


def parser() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(prog="python -m benchmarks", description=DESCRIPTION)
    argument_types.add_device(made)
    made.add_argument(
        "--only",
        nargs="+",
        metavar="GROUP",
        choices=ALL_GROUPS,
        help=f"measure these groups: {', '.join(ALL_GROUPS)} (default: all; cpu and host on a CPU)",
    )
    argument_types.add_results(
        made, "merge the groups into this JSON file; refused where GPU, versions or sources differ"
    )
    made.add_argument(
        "--vllm-op-library",
        type=argument_types.file,
        metavar="PATH",
        help="measure vLLM's compiled op alone: _C_stable_libtorch.abi3.so out of its wheel",
    )
    made.add_argument("--vllm-version", metavar="VERSION", help="of that library, for the record")
    made.add_argument("--dirty", action="store_true", help="record results of changed sources")
    made.add_argument(
        "--rounds", type=argument_types.positive, default=ROUNDS, help=f"timed, default {ROUNDS}"
    )
    made.add_argument("--quick", action="store_true", help="tiny shapes: does everything run?")
    return made


def main(arguments: list[str]) -> int:
    options = parser().parse_args(arguments)
    if options.vllm_version and not options.vllm_op_library:
        raise SystemExit("benchmarks: --vllm-version is of --vllm-op-library, which is not given")
    device: torch.device = options.device
    if device.type == "cuda":
        prepare_gpu(device)
    results, here, commit = open_results(options, device)
    missing = missing_providers(device, options.vllm_op_library)
    for provider, why in missing.items():
        print(f"{provider} is not measured: {why}")

    groups: Sequence[str] = options.only or (
        ALL_GROUPS if device.type == "cuda" else ("cpu", "host")
    )
    with Progress().shown() as progress:
        for group in groups:
            begin = time.monotonic()
            records = measure_group(group, device, missing, options, progress)
            run = environment.circumstances(device, commit)
            run |= {"seconds": round(time.monotonic() - begin), "missing": missing}
            results.add(group, here, run, records)
            if options.output:
                results.save(options.output)
    print_groups(results, groups)
    return report_failures(results, groups)


def prepare_gpu(device: torch.device) -> None:
    if merge_attn_states.build_info()["cuda"] is None:
        raise SystemExit("benchmarks: merge_attn_states was built without CUDA kernels")
    torch.cuda.set_device(device.index or 0)
    for name in ("triad", "bare_launch"):
        library(name)


def current(
    options: argparse.Namespace, device: torch.device, trees: dict[str, Any]
) -> dict[str, Any]:
    library, version = options.vllm_op_library, options.vllm_version
    if device.type == "cuda" and library and vllm.load(library):
        library = version = None  # it cannot be measured: missing_providers says why
    return environment.identity(device, trees, version, library) | {"quick": options.quick}


def open_results(
    options: argparse.Namespace, device: torch.device
) -> tuple[Results, dict[str, Any], str]:
    """The file to merge into, or new results; this environment; the commit.

    Refuses before anything is measured.
    """
    if options.output is None:
        trees = dict.fromkeys((*environment.TREES, "commit")) | {"dirty": True}
        here = current(options, device, trees)
        return Results(here), here, trees["commit"]
    trees = environment.source_trees(options.source_trees)
    trees["dirty"] |= options.dirty
    if trees["dirty"] and not options.dirty:
        raise SystemExit(
            "benchmarks: csrc or python has changes, or had when the binary was built; commit them "
            "and build again, or say --dirty"
        )
    if why := environment.built_from_elsewhere(trees):
        raise SystemExit(f"benchmarks: {why}")
    here = current(options, device, trees)
    if not options.output.exists():
        return Results(here), here, trees["commit"]
    results = Results.load(options.output)
    if why := results.refuses(here, environment.machine()):
        raise SystemExit(f"benchmarks: {options.output} holds other results: {why}")
    return results, here, trees["commit"]


def measure_group(
    group: str,
    device: torch.device,
    missing: dict[str, str],
    options: argparse.Namespace,
    progress: Progress,
) -> list[Record]:
    records: list[Record] = []
    if group == "host":
        for _ in progress.follow(group, [group]):
            records += measure_host(device, missing, options.vllm_op_library, options.quick)
        return records
    if group == "cpu":
        device = torch.device("cpu")
        missing = missing_providers(device, None) | {"compile": "not asked"}
    elif device.type == "cpu":
        missing = missing | {"compile": "not asked"}
    comparisons = quick(GROUPS[group]) if options.quick else GROUPS[group]
    asked = providers(missing)
    most_sets = 3 if options.quick else None  # a tiny shape would take thousands
    for comparison in progress.follow(group, comparisons):
        records += measure(group, comparison, asked, device, options.rounds, most_sets)
    return records


def report_failures(results: Results, groups: Sequence[str]) -> int:
    """Whether everyone who took a case gave the right answer; says who did not."""
    bad = [
        record
        for group in groups
        for record in results.select(group, lambda r: r.get("status") in ("wrong", "failed"))
    ]
    for record in bad:
        print(
            f"{record['provider']} {record['status']}: {record['group']} {case_title(record)}: "
            f"{record['reason']}"
        )
    return int(any(record["provider"].startswith("ours") for record in bad))
