"""Results as tables: plain text for a terminal, Markdown for README and docs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from .providers import TITLES
from .results import Record, Results, case_title

Row = Sequence[str]


def plain(header: Row, rows: Iterable[Row]) -> str:
    """Columns as wide as they must be, the first to the left and the others to the right."""
    table = [list(header), *map(list, rows)]
    first, *others = (max(map(len, column)) for column in zip(*table, strict=True))
    lines = []
    for name, *cells in table:
        padded = (cell.rjust(width) for cell, width in zip(cells, others, strict=True))
        lines.append("  ".join([name.ljust(first), *padded]))
    return "\n".join(lines)


def markdown(header: Row, rows: Iterable[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def microseconds(value: float | None) -> str:
    """Three digits are what a clock gives."""
    if value is None:
        return "-"
    return f"{value:.0f}" if value >= 100 else f"{value:.1f}" if value >= 10 else f"{value:.2f}"


def megabytes(moved: int) -> str:
    size = moved / 1e6
    return f"{size:.0f}" if size >= 10 else f"{size:.1f}" if size >= 0.05 else f"{size:.3f}"


OTHERS = ("vllm", "flashinfer", "compile", "eager")
CASE_HEADER = ("case", "MB", "of limit", "vs vLLM", "us", "quartiles", "limit", *OTHERS)


def case_row(results: Results, record: Record) -> list[str]:
    """A case of ours: its time and spread, how it stands to the limit, and the others' times."""
    others = [results.of(record, provider) or {} for provider in OTHERS]
    row = [
        case_title(record),
        megabytes(record["bytes"]),
        number(results.of_limit(record), 3),
        number(results.speed_up(record, "vllm"), 3),
    ]
    if "status" in record:
        return [*row, record["status"], *["-"] * (2 + len(others))]
    return [
        *row,
        microseconds(record["median_us"]),
        f"{microseconds(record['low_us'])}-{microseconds(record['high_us'])}",
        microseconds(results.us(results.limit(record))),
        *(other.get("status") or microseconds(results.us(other)) for other in others),
    ]


def print_groups(results: Results, groups: Iterable[str]) -> None:
    """What was measured, for people."""
    print("\n".join(f"{key}: {value}" for key, value in results.environment.items()))
    for group in groups:
        print(f"\n{group}")
        if group == "host":
            print(plain(("us a call, 4x8x128", "tight", "swept"), host_rows(results)))
        else:
            rows = [case_row(results, record) for record in results.ours(group)]
            print(plain(CASE_HEADER, rows))


def host_times(results: Results, provider: str) -> list[str]:
    """Its tight and swept microseconds; empty where it was not asked."""
    found = {r["regime"]: r for r in results.select("host") if r["provider"] == provider}
    return [
        found[regime].get("status") or microseconds(results.us(found[regime]))
        for regime in ("tight", "swept")
        if regime in found
    ]


def host_rows(results: Results) -> list[list[str]]:
    """A provider a row: tight and swept microseconds."""
    rows = ([title, *host_times(results, provider)] for provider, title in TITLES.items())
    return [row for row in rows if len(row) > 1]
