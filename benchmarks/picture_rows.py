"""What each picture shows, as rows of text: they are drawn, and embedded in the picture's file.

So whether a picture is that of a results file is seen without drawing it again, whatever the
version of matplotlib.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence

from .cases import ALL_GROUPS
from .providers import TITLES
from .results import Record, Results

Row = tuple[str, ...]

COMPARED = ("ours", "vllm", "flashinfer", "compile", "eager")
SHAPED = tuple(group for group in ALL_GROUPS if group != "host")
CURVES = ("sweep", "warm", "small", "models")  # plain cases; the others are special ones


def limit_rows(machines: Sequence[Results]) -> Iterator[Row]:
    """gpu, regime, provider, bytes, percent of the limit: a point each."""
    for results in machines:
        seen = set()
        for record in _records(results, CURVES):
            key = (record["case"], record["regime"], record["provider"])
            share = results.of_limit(record)
            if record["provider"] in COMPARED and share is not None and key not in seen:
                seen.add(key)
                yield (
                    results.gpu,
                    record["regime"],
                    record["provider"],
                    str(record["bytes"]),
                    f"{100 * share:.1f}",
                )


def vllm_rows(machines: Sequence[Results]) -> Iterator[Row]:
    """panel, label, bytes, gpu, regime, vLLM's time over ours: a marker each."""
    for results in machines:
        seen = set()
        for record in _records(results, SHAPED):
            speed_up = results.speed_up(record, "vllm")
            if record["provider"] != "ours" or speed_up is None:
                continue
            panel, label = _panel_and_label(record)
            if (panel, label, record["regime"]) not in seen:
                seen.add((panel, label, record["regime"]))
                moved = str(record["bytes"])
                yield panel, label, moved, results.gpu, record["regime"], f"{speed_up:.3f}"


def host_rows(machines: Sequence[Results]) -> Iterator[Row]:
    """gpu, regime, provider, median, quartiles in microseconds: a bar each."""
    for results in machines:
        order = {provider: place for place, provider in enumerate(TITLES)}
        timed = results.select("host", lambda record: "median_us" in record)
        for record in sorted(timed, key=lambda r: (r["regime"], order[r["provider"]])):
            times = (f"{record[name]:.2f}" for name in ("median_us", "low_us", "high_us"))
            yield (results.gpu, record["regime"], record["provider"], *times)


ROWS: dict[str, Callable[[Sequence[Results]], Iterator[Row]]] = {
    "limit": limit_rows,
    "vllm": vllm_rows,
    "host": host_rows,
}


def description(rows: Sequence[Row]) -> str:
    return "\n".join("\t".join(row) for row in rows)


def _records(results: Results, groups: Sequence[str]) -> Iterator[Record]:
    """In the order of the groups, whatever the order they were measured in."""
    for group in groups:
        yield from results.select(group)


def _panel_and_label(record: Record) -> tuple[str, str]:
    shape, _, special = record["case"].partition(" ")
    if record["group"] == "models":
        heads, head_size = record["heads"], record["head_size"]
        return "models", f"{record['model']}, {heads}x{head_size}, {record['tokens']} tokens"
    if special == "bf16":
        return "shapes", shape
    if "," not in special:
        return "dtypes", record["case"]
    short = record["case"].replace(" bf16,", ",")
    return "special", short.replace("half the tokens have context", "half with context")
