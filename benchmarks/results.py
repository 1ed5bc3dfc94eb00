"""The results file: one JSON a machine, into which the groups of several runs merge.

    {"schema": 1,
     "environment": {gpu, driver, cpu, torch, ..., trees: {csrc, include, python}, dirty},
     "runs": {group: {date, commit, clocks, processes, seconds, missing: {who: why}}},
     "records": [{group, case, us: {provider: [one a process]}, refused: {who: why}, ...}]}

A record is a line: a case's fields (cases.py, states_cases.py), its bytes by the contract, which
kernel of ours ran, and everybody's microseconds (added, between neighbours) in each process;
`limit` is the best plain kernel, and which one that is. Times are compared within a process, since
clocks differ between them, and the median of that is taken. The environment agrees for all groups.
Across ranks the GPU is "2 x ...", a time is the slowest rank's, and `transport` what "ours" is by.
"""

from __future__ import annotations

import json
import operator
import statistics
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SCHEMA = 1


class Results:
    """A results file in memory."""

    def __init__(self, environment: dict[str, Any]) -> None:
        self.environment = environment
        self.runs: dict[str, dict[str, Any]] = {}
        self.records: list[Record] = []

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            if data["schema"] != SCHEMA:
                raise ValueError(f"expected schema {SCHEMA}, got {data['schema']}")
            results = cls(data["environment"])
            results.runs, results.records = data["runs"], data["records"]
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise SystemExit(f"{path} is no results file: {error!r}") from error
        return results

    @classmethod
    def open(cls, path: Path | None, environment: dict[str, Any]) -> Results:
        """What a file of this environment holds, to merge into; nothing where there is none."""
        if path is None or not path.exists():
            return cls(environment)
        results = cls.load(path)
        for key, there in results.environment.items():
            if (here := environment.get(key)) != there:
                said = f"holds other results: {key} is {here!r} now and {there!r} in the file"
                raise SystemExit(f"benchmarks: {path} {said}")
        return results

    def save(self, path: Path) -> None:
        """A run or a record a line, so that a difference can be read."""
        runs = [f"{json.dumps(group)}: {json.dumps(run)}" for group, run in self.runs.items()]
        records = ",\n".join(map(json.dumps, self.records))
        head = f'"schema": {SCHEMA},\n"environment": {json.dumps(self.environment, indent=1)}'
        body = f'"runs": {{\n{", ".join(runs)}\n}},\n"records": [\n{records}\n]'
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{{{head},\n{body}}}\n", encoding="utf-8")

    def add(self, group: str, run: Record, made: Iterable[Record]) -> None:
        """Put a group's records in, in place of those of an earlier run."""
        self.runs[group] = run
        self.records = [one for one in self.records if one["group"] != group]
        self.records += [{"group": group} | record for record in made]

    @property
    def gpu(self) -> str:
        """The GPU's name as people say it: "H100", "2 x H100"; "CPU" where there is none."""
        count, of, name = (self.environment["gpu"] or "CPU").rpartition(" x ")
        return count + of + next((w for w in ("H100", "H200") if w in name.split()), name)

    def select(self, group: str, **fields: Any) -> list[Record]:
        """A group's records whose fields have these values."""
        wanted = {"group": group} | fields
        return [record for record in self.records if wanted.items() <= record.items()]

    def contiguous(self, record: Record, kind: str = "contiguous") -> Record | None:
        """The record of the same size with nothing special about it, or of another kind."""
        same = {field: record.get(field) for field in ("size", "dtype", "head_size")}
        return next(iter(self.select(record["group"], kind=kind, **same)), None)


def times_of(record: Record | None, provider: str) -> list[float]:
    """A provider's microseconds, one a process; none where it was not timed."""
    return record["us"].get(provider, []) if record else []


def time_of(record: Record | None, provider: str) -> float | None:
    """The median of a provider's microseconds."""
    us = times_of(record, provider)
    return statistics.median(us) if us else None


def compared(
    of: list[float], over: list[float], comparison: Callable[[float, float], float]
) -> float | None:
    """The median over the processes of what each of them says."""
    said = list(map(comparison, of, over))
    return statistics.median(said) if said else None


def ratio(record: Record | None, of: str, over: str, base: Record | None = None) -> float | None:
    """One provider's time over another's, which may be of another record of the same run."""
    return compared(times_of(record, of), times_of(base or record, over), operator.truediv)
