"""Results as Markdown tables, for a terminal, README and docs."""

import statistics
from collections.abc import Iterable, Iterator, Sequence

from .cases import PLAIN, RANKS
from .results import Record, Results, ratio, time_of

Row = Sequence[str]
Table = tuple[Row, Sequence[Row]]
AT_THE_LIMIT = "at the limit"
HOST = {  # who is called on the host, in the order of the table
    "ours": "merge_attn_states",
    "ours_keyword": "merge_attn_states, by keyword",
    "ours_ops": "torch.ops.merge_attn_states",
    "add": "torch.add(out=)",
    "vllm": "vLLM's op",
    "vllm_dispatcher": "vLLM's op behind its dispatcher",
    "eager": "the formula, eager",
    "compile": "the formula by torch.compile",
    "warm-up": "torch.compile's first call",
}


def markdown(header: Row, rows: Iterable[Row]) -> str:
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def number(value: float | None, digits: int = 2) -> str:
    return "-" if value is None else f"{value:.{digits}f}"


def microseconds(value: float | None) -> str:
    """Three digits are what a clock gives."""
    return number(value, 0 if (value or 0) >= 100 else 1 if (value or 0) >= 10 else 2)


def megabytes(moved: int) -> str:
    return microseconds(moved / 1e6) if moved > 5e4 else number(moved / 1e6, 3)


def times(value: float | None) -> str:
    """How often one time goes into another: a loss is not rounded away."""
    return f"{number(value, 3 if value and 0.995 <= value < 1.005 else 2)}{'x' if value else ''}"


def spread(record: Record, provider: str) -> str:
    """Median over the processes, and what they lie between; or why there is none."""
    if provider not in record["us"]:
        return str(record["refused"].get(provider, "-")).partition(":")[0]
    us = record["us"][provider]
    median, least, most = (microseconds(f(us)) for f in (statistics.median, min, max))
    return median if least == most else f"{median} ({least}-{most})"


def of_limit(record: Record) -> str:
    """Between neighbours our time over the limit's, cold our bytes a second over its.

    Where ours takes no longer, the limit can tell no more: nothing is shown above it.
    """
    value = ratio(record, "ours", "limit")
    if value is not None and value <= 1:
        return AT_THE_LIMIT
    is_cold = "cold" in (record["group"], record.get("regime"))
    return number(1 / value, 3) if value and is_cold else times(value)


GPU = ("vLLM", "vLLM / ours", "ours / contiguous")
NEIGHBOURS = (*GPU, "empty kernel", "torch.compile", "eager", "neighbours alone")
MANY = ("chain / ours", "FlashInfer / ours", "eager / ours", "torch.compile / ours", "kernel")
HEADERS = {
    "neighbours": ("us added", "MB", "ours", "limit", "ours / limit", *NEIGHBOURS),
    "cold": ("us", "MB", "ours", "limit", "of the limit", *GPU, "the limit is"),
    "states, neighbours": ("us added", "MB", "ours", "limit", "ours / limit", *MANY),
    "states, cold": ("us", "MB", "ours", "limit", "of the limit", *MANY),
    "cpu": ("us", "MB", "ours", "torch.ops", "torch.add's bytes", "eager", "eager / ours"),
    "ranks, merges": (  # whose time, and whose over whose
        *("us", "ours", "ours in its buffer", "ours collective", "vllm", "vllm / ours"),
        *("all-to-all", "all-to-all / ours", "ours / ours in its buffer", "vLLM AG + RS"),
        *("vLLM AG + RS / ours collective", "vLLM A2A", "eager"),
    ),
    "ranks, layers": ("us", "ours", "PyTorch", "PyTorch / ours"),
}
HEADLINE_COLUMNS = 7  # of the neighbours'


def _row(results: Results, record: Record) -> Iterator[str]:
    group = record["group"]
    if group == RANKS:
        yield record["case"]
        for title in HEADERS[f"{group}, {record['regime']}"][1:]:
            of, _, over = title.partition(" / ")
            yield times(ratio(record, of, over)) if over else spread(record, of)
        return
    yield from (record["case"], megabytes(record["bytes"]), spread(record, "ours"))
    if group == "cpu":
        yield from (spread(record, provider) for provider in ("ours_ops", "add", "eager"))
        yield times(ratio(record, "eager", "ours"))
        return
    yield from (spread(record, "limit"), of_limit(record))
    if group == "states":
        others = ("pair" if record["parts"] == 2 else "chain", "flashinfer", "eager", "compile")
        yield from (times(ratio(record, name, "ours")) for name in others)
        yield record.get("variant", "-")
        return
    yield from (spread(record, "vllm"), times(ratio(record, "vllm", "ours")))
    base = None if record["kind"] == PLAIN else results.contiguous(record)
    yield times(ratio(record, "ours", "ours", base)) if base else "-"
    if group == "cold":
        yield record.get("limit", "-")
    else:
        others = ("empty", "compile", "eager", "neighbours")
        yield from (microseconds(time_of(record, name)) for name in others)


def headline(results: Results) -> list[Record]:
    """Between neighbours in bfloat16, size for size: README's table and picture."""
    return results.select("neighbours", kind=PLAIN, dtype="bfloat16", head_size=128)


def headline_table(results: Results) -> Table:
    rows = [list(_row(results, record))[:HEADLINE_COLUMNS] for record in headline(results)]
    return HEADERS["neighbours"][:HEADLINE_COLUMNS], rows


def ring_steps(results: Results) -> list[Record]:
    return results.select("states", kind="ring step", regime="cold")


def ring_table(results: Results) -> Table:
    """README's: a ring's step and who else takes it."""
    columns = [0, 1, 2, 3, 4, 7, 8]
    rows = [list(_row(results, record)) for record in ring_steps(results)]
    header, *rows = [[row[i] for i in columns] for row in (HEADERS["states, cold"], *rows)]
    return header, rows


def group_tables(results: Results, group: str) -> Iterator[tuple[str, Table]]:
    """Every case of a group, under its name and the regime's; of a host a provider a row."""
    if group not in ("states", RANKS):
        yield group, _table(results, group, results.select(group))
        return
    for regime in ("neighbours", "cold", "host", "merges", "layers"):
        if records := results.select(group, regime=regime):
            yield f"{group}, {regime}", _table(results, f"{group}, {regime}", records)


def _table(results: Results, title: str, records: Sequence[Record]) -> Table:
    if title in HEADERS:
        return HEADERS[title], [list(_row(results, record)) for record in records]
    named = HOST | ({"ours": "update_state"} if title == "states, host" else {})
    rows = [
        [name, *(spread(record, provider) for record in records)]
        for provider, name in named.items()
        if any(provider in record["us"] for record in records)
    ]
    size = records[0].get("size", "4x8") if records else "4x8"
    return [f"us a call at {size}x128", *(record["case"] for record in records)], rows
