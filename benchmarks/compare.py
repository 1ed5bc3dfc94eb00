"""Two builds of the op library side by side: `python -m benchmarks compare OLD.so NEW.so`.

One process can hold one of them, so each is measured in processes of its own, in turn, against the
same limit (the triad; on a CPU torch.add): what is compared is the share of the limit, since a
process's clocks differ from the next one's. Calls go through torch.ops, since _C belongs to one op
library: on a CPU a small call's time is mostly its way.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import torch

from merge_attn_states._library import OP_LIBRARY

from . import argument_types
from .cases import GROUPS, quick
from .host import run_processes
from .measure import measure
from .providers import providers
from .results import MAY_BE_MISSING, Results, case_title
from .tables import microseconds, number, plain

Shares = dict[str, tuple[float, float]]  # by case: microseconds, share of the limit


def measured(groups: Sequence[str], device: torch.device, tiny: bool, rounds: int) -> Shares:
    """What this process's op library takes."""
    ours = [one for one in providers({}) if one.name == "ours"]
    nowhere = dict.fromkeys(MAY_BE_MISSING)
    results = Results(dict(nowhere))
    found: Shares = {}
    for group in groups:
        comparisons = quick(GROUPS[group]) if tiny else GROUPS[group]
        records = [
            record
            for comparison in comparisons
            for record in measure(group, comparison, ours, device, rounds, 3 if tiny else None)
        ]
        results.add(group, nowhere, {}, records)
        for record in results.ours(group):
            share = results.of_limit(record)
            if share is not None:
                found[f"{group}: {case_title(record)}"] = (record["median_us"], share)
    return found


def with_library(library: Path, folder: Path) -> Path:
    """A copy of the package with that op library, and without _C, which belongs to another."""
    package = OP_LIBRARY.parent
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, folder / package.name, ignore=ignored)
    shutil.copy(library, folder / package.name / OP_LIBRARY.name)
    return folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument(
        "libraries", type=argument_types.file, nargs="*", metavar="LIBRARY", help="two or more"
    )
    parser.add_argument("--only", nargs="+", choices=GROUPS, default=["small", "warm", "layouts"])
    argument_types.add_device(parser)
    number = argument_types.positive
    parser.add_argument("--turns", type=number, default=2, help="processes of each, default 2")
    parser.add_argument("--rounds", type=number, default=9, help="timed in each, default 9")
    parser.add_argument("--process", action="store_true", help=argparse.SUPPRESS)
    parser.add_argument("--quick", action="store_true", help="tiny shapes: does it run?")
    options = parser.parse_args(arguments)
    if options.process:  # one of those that measure
        found = measured(options.only, options.device, options.quick, options.rounds)
        print(json.dumps(found))
        return 0
    if len(options.libraries) < 2:
        parser.error("expected two op libraries or more")
    given = ["--process", "--only", *options.only, "--device", str(options.device)]
    given += ["--rounds", str(options.rounds), *(["--quick"] if options.quick else [])]
    seen: list[list[Shares]] = [[] for _ in options.libraries]
    with tempfile.TemporaryDirectory() as folder:
        paths = [
            with_library(Path(library), Path(folder, str(index)))
            for index, library in enumerate(options.libraries)
        ]
        for _ in range(options.turns):
            for path, one in zip(paths, seen, strict=True):
                one += run_processes("benchmarks.compare", given, 1, first_on_path=path)
    print(table(options.libraries, seen))
    return 0


def table(names: Sequence[str], seen: Sequence[Sequence[Shares]]) -> str:
    """Of each library the median of its processes: microseconds, and the share of the limit."""
    header = ["case", *(text for name in names for text in (f"{name}: us", "of limit"))]
    rows = []
    for case in seen[0][0]:
        row = [case]
        for one in seen:
            us = statistics.median(shares[case][0] for shares in one)
            share = statistics.median(shares[case][1] for shares in one)
            row += [microseconds(us), number(share, 3)]
        rows.append(row)
    return plain(header, rows)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
