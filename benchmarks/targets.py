"""How a results file does against what we ask of ourselves (target_list.py).

A target is met where its worst case meets it. Both are published, met or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from .results import Results, case_title
from .tables import number, plain
from .target_list import ANY_MACHINE, TARGETS


class Outcome(NamedTuple):
    """`measured` is the worst of the cases, `case` which one that is; None: not measured."""

    text: str
    asked: str
    measured: float | None
    case: str
    met: bool | None


def outcomes(results: Results) -> Iterator[Outcome]:
    """Every target that is set for this machine; a case that failed misses its target."""
    for target in TARGETS:
        limit = target.limits.get(results.gpu, target.limits.get(ANY_MACHINE))
        if limit is None:
            continue
        values, failed = [], []
        for record in results.select(target.group, target.chosen):
            if record["provider"] in target.provider:
                name, value = case_title(record), target.value(results, record)
                if value is not None:
                    values.append((value, name))
                elif record.get("status") in ("wrong", "failed"):
                    failed.append(f"{name}: {record['status']}")
        worst, case = (min if target.at_least else max)(values, default=(None, "not measured"))
        met = None if worst is None else worst >= limit if target.at_least else worst <= limit
        if failed:
            met, case = False, failed[0]
        asked = f"{'>=' if target.at_least else '<='} {limit:g}"
        yield Outcome(target.text, asked, worst, case, met)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks targets", description=__doc__)
    parser.add_argument("files", type=Path, nargs="+")
    for path in parser.parse_args(arguments).files:
        results = Results.load(path)
        rows = [
            (
                outcome.text,
                outcome.asked,
                number(outcome.measured, 3),
                {True: "met", False: "missed", None: "-"}[outcome.met],
                outcome.case,
            )
            for outcome in outcomes(results)
        ]
        print(f"{path}: {results.environment['gpu'] or 'no GPU'}")
        print(plain(("target", "asked", "measured", "", "worst case"), rows))
    return 0
