"""The results file: one JSON for each GPU, into which the groups of several runs merge.

    {"schema": 1,
     "environment": {gpu, driver, torch, ..., trees: {csrc, python}, dirty},  agrees for all groups
     "runs": {group: {date, commit, built_from, cpu, threads, clocks, seconds, missing: {who: why}}}
     "records": [{group, case, regime, provider, bytes, median_us, low_us, high_us, ...}]}

A record has the case's fields (tokens, heads, head_size; those with their default value left out:
cases.py), `bytes` counted from the contract, the median and the quartiles in microseconds; or no
times, but `status` ("not supported", "wrong", "failed") and `reason`. Ours also names its kernel
and variant, and the host's carry `processes`, the medians of each process.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

Record = dict[str, Any]
SCHEMA = 1
KEY = ("group", "case", "regime", "provider")
MAY_BE_MISSING = ("vllm", "vllm_op_library", "flashinfer")


def case_title(record: Record) -> str:
    """The case and its regime."""
    return f"{record['case']} {record['regime']}"


class Results:
    """A results file in memory."""

    def __init__(self, environment: dict[str, Any]) -> None:
        self.environment = environment
        self.runs: dict[str, dict[str, Any]] = {}
        self.records: list[Record] = []
        self._found: dict[tuple[str, ...], Record] = {}

    @classmethod
    def load(cls, path: Path) -> Results:
        try:
            data = json.loads(path.read_text(encoding="utf-8"))
            schema = data["schema"]
            results = cls(data["environment"])
            results.runs = data["runs"]
            results._hold(data["records"])
        except (OSError, ValueError, KeyError, TypeError) as error:
            said = f"{type(error).__name__}: {error}"
            raise SystemExit(f"{path} is no results file: {said}") from error
        if schema != SCHEMA:
            raise SystemExit(f"{path}: expected schema {SCHEMA}, got {schema}")
        return results

    def save(self, path: Path) -> None:
        """One record a line, so that a difference can be read."""

        def lines(values: Iterator[str]) -> str:
            return ",\n".join(f"  {value}" for value in values)

        runs = (f"{json.dumps(group)}: {json.dumps(run)}" for group, run in self.runs.items())
        environment = json.dumps(self.environment, indent=2).replace("\n", "\n ")
        text = (
            f'{{\n "schema": {SCHEMA},\n "environment": {environment},\n'
            f' "runs": {{\n{lines(runs)}\n }},\n'
            f' "records": [\n{lines(json.dumps(record) for record in self.records)}\n ]\n}}\n'
        )
        path.parent.mkdir(parents=True, exist_ok=True)
        unfinished = path.with_suffix(".unfinished")
        unfinished.write_text(text, encoding="utf-8")
        unfinished.replace(path)

    def refuses(self, environment: dict[str, Any], machine: dict[str, Any]) -> str:
        """Why results of there may not stand in this file; empty where they may."""
        for key, here in self.environment.items():
            there = environment.get(key)
            if here != there and not (key in MAY_BE_MISSING and None in (here, there)):
                return f"{key} is {there!r} now and {here!r} in the file"
        for group, run in self.runs.items():
            for key, there in machine.items():
                if run.get(key) != there:
                    return f"{key} is {there!r} now and {run.get(key)!r} in the file's {group}"
        return ""

    def add(self, group: str, environment: dict[str, Any], run: Record, made: list[Record]) -> None:
        """Put a group's records in, in place of those of an earlier run."""
        for key in MAY_BE_MISSING:
            self.environment[key] = self.environment[key] or environment[key]
        self.runs[group] = run
        self._hold([one for one in self.records if one["group"] != group] + made)

    def _hold(self, records: list[Record]) -> None:
        self.records = records
        self._found = {tuple(one[field] for field in KEY): one for one in records}

    @property
    def gpu(self) -> str:
        """The GPU's name as people say it: "H100"; the CPU's where there is none."""
        name: str | None = self.environment["gpu"]
        if name is None:
            return "CPU"
        return next((word for word in ("H100", "H200") if word in name.split()), name)

    def select(self, group: str, chosen: Callable[[Record], bool] = lambda _: True) -> list[Record]:
        return [one for one in self.records if one["group"] == group and chosen(one)]

    def ours(self, group: str) -> list[Record]:
        """All but ours through torch.ops, which is the same kernel."""
        return self.select(group, lambda record: record["provider"] == "ours")

    def of(self, record: Record, provider: str) -> Record | None:
        """The same case's record of another provider."""
        return self.find(record["group"], record["case"], record["regime"], provider)

    def find(self, group: str, case: str, regime: str, provider: str) -> Record | None:
        return self._found.get((group, case, regime, provider))

    def us(self, record: Record | None) -> float | None:
        found: float | None = record.get("median_us") if record else None
        return found

    def limit(self, record: Record) -> Record | None:
        """What bounds the record's case: the triad's record, on the CPU torch.add's."""
        return self.of(record, "triad") or self.of(record, "add")

    def of_limit(self, record: Record) -> float | None:
        """Bytes over time, divided by the same of the memory's limit in the same run."""
        limit = self.limit(record)
        if limit is None or "median_us" not in record or "median_us" not in limit:
            return None
        rate: float = record["bytes"] / record["median_us"]
        return rate / float(limit["bytes"] / limit["median_us"])

    def speed_up(self, record: Record, over: str) -> float | None:
        """Another provider's time over this record's."""
        theirs = self.us(self.of(record, over))
        ours = self.us(record)
        return theirs / ours if theirs and ours else None
