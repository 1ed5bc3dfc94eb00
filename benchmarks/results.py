"""The results file: one JSON a machine, into which the groups of several runs merge.

    {"schema": 1,
     "environment": {gpu, driver, cpu, torch, ..., trees: {csrc, include, python}, dirty},
     "runs": {group: {date, commit, clocks, processes, seconds, missing: {who: why}}},
     "records": [{group, case, us: {provider: [median, least, most]}, refused: {who: why}, ...}]}

A record is a line: a case's fields (cases.py), its bytes by the contract, which kernel of ours ran,
and the microseconds of everybody, over the processes; `limit` is the best plain kernel, and which
one that is. Between neighbours they are microseconds added. The environment agrees for all groups.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
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
            said = f"{type(error).__name__}: {error}"
            raise SystemExit(f"{path} is no results file: {said}") from error
        return results

    def save(self, path: Path) -> None:
        """A run or a record a line, so that a difference can be read."""
        runs = [f"{json.dumps(group)}: {json.dumps(run)}" for group, run in self.runs.items()]
        records = ",\n".join(map(json.dumps, self.records))
        head = f'"schema": {SCHEMA},\n"environment": {json.dumps(self.environment, indent=1)}'
        body = f'"runs": {{\n{", ".join(runs)}\n}},\n"records": [\n{records}\n]'
        path.write_text(f"{{{head},\n{body}}}\n", encoding="utf-8")

    def add(self, group: str, run: Record, made: Iterable[Record]) -> None:
        """Put a group's records in, in place of those of an earlier run."""
        self.runs[group] = run
        self.records = [one for one in self.records if one["group"] != group]
        self.records += [{"group": group} | record for record in made]

    @property
    def gpu(self) -> str:
        """The GPU's name as people say it: "H100"; "CPU" where there is none."""
        name: str | None = self.environment["gpu"]
        if name is None:
            return "CPU"
        return next((word for word in ("H100", "H200") if word in name.split()), name)

    def select(self, group: str, **fields: Any) -> list[Record]:
        """A group's records whose fields have these values."""
        return [
            record
            for record in self.records
            if record["group"] == group and all(record.get(k) == v for k, v in fields.items())
        ]

    def contiguous(self, record: Record) -> Record | None:
        """The record of the same size with nothing special about it."""
        same = {field: record.get(field) for field in ("size", "dtype", "head_size")}
        return next(iter(self.select(record["group"], kind="contiguous", **same)), None)


def time_of(record: Record | None, provider: str) -> float | None:
    """A provider's median microseconds."""
    us: list[float] | None = record["us"].get(provider) if record else None
    return us[0] if us else None


def ratio(record: Record | None, of: str, over: str) -> float | None:
    """One provider's time over another's."""
    time, base = time_of(record, of), time_of(record, over)
    return time / base if time is not None and base else None
