"""Records of the rigs: a case, regime and provider, its median and quartiles in microseconds."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

from benchmarks import report
from benchmarks.host import Times
from benchmarks.results import Record, Results
from benchmarks.timing import Timing


def rounded(timing: Timing) -> Record:
    """The times as JSON fields, with as many digits as a clock gives."""
    names = ("median_us", "low_us", "high_us")
    return {name: float(f"{value:.4g}") for name, value in zip(names, timing, strict=True)}


def best_of(processes: list[Times]) -> Iterator[Record]:
    """A record for each regime and provider: its best process, and the medians of all."""
    for regime in processes[0]:
        for provider in processes[0][regime]:
            timings = [Timing(*process[regime][provider]) for process in processes]
            medians = [rounded(timing)["median_us"] for timing in timings]
            record = {"regime": regime, "provider": provider, **rounded(min(timings))}
            yield record | {"processes": medians}


def us(record: Record | None) -> float | None:
    found: float | None = record.get("median_us") if record else None
    return found


def speed_up(ours: Record | None, theirs: Record | None) -> float | None:
    """Their time over ours."""
    mine, other = us(ours), us(theirs)
    return other / mine if mine and other else None


def load(paths: list[Path]) -> list[Results]:
    """Results files, none of them of --quick."""
    machines = report.load(paths)
    if any(results.environment.get("quick") for results in machines):
        raise SystemExit("benchmarks: results of --quick, which measures nothing: not published")
    return machines
