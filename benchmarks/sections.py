"""What README.md and docs/benchmarks.md say of results files, as Markdown."""

from __future__ import annotations

import statistics
from collections.abc import Iterable, Iterator, Sequence

from .cases import ALL_GROUPS, HOST_CASE
from .picture_rows import ROWS, SHAPED
from .providers import TITLES
from .results import Record, Results, case_title
from .tables import CASE_HEADER, case_row, host_times, markdown, megabytes, microseconds, number
from .targets import outcomes

NO_RESULTS = "There are no results yet: `python -m benchmarks` makes them."
SHOWN = (  # in README, chosen by size and not by outcome: (group, case, regime)
    ("small", "1x128x128 bf16", "cold"),
    ("small", "1x128x128 bf16", "warm"),
    ("small", "64x16x128 bf16", "cold"),
    ("small", "64x16x128 bf16", "warm"),
    ("small", "256x16x128 bf16", "cold"),
    ("small", "256x16x128 bf16", "warm"),
    ("warm", "1024x16x128 bf16", "warm"),
    ("sweep", "2048x16x128 bf16", "cold"),
    ("warm", "2048x16x128 bf16", "warm"),
    ("warm", "2048x32x64 bf16", "warm"),
    ("sweep", "8192x16x128 bf16", "cold"),
    ("sweep", "8192x64x64 bf16", "cold"),
    ("sweep", "8192x128x128 bf16", "cold"),
)
PICTURES = {
    "limit": "Percent of the memory's limit over bytes moved, cold and warm",
    "vllm": "vLLM's time over ours, a line a shape",
    "host": "What an eager call costs the host, in a tight loop and swept",
}


def readme(machines: Sequence[Results]) -> str:
    if not machines:
        return NO_RESULTS
    # A machine without a GPU has a sentence; it would be an empty column.
    tabled = [results for results in machines if results.environment["gpu"]] or machines
    vllm = _joined(results.environment["vllm"] for results in machines)
    vllm = f"vLLM {vllm}" if vllm else "vLLM"
    paragraphs = [
        "Of the limit: bytes over time, divided by the same of a plain kernel that reads two "
        f"buffers and writes one. Over vLLM: the time of {vllm}'s own op over ours. Cold: "
        "the inputs come from DRAM; warm: they lie in L2.",
        _shapes_table(tabled),
        *_other_sources(tabled),
        *_pictures(machines, ["limit"], "docs/benchmarks"),
        *(_summary(results) for results in tabled),
        f"An eager call at {HOST_CASE.shape}, microseconds of the host, launch included, in a "
        "tight loop / with 16 MB of other memory touched before each call:",
        _host_table(tabled),
        *filter(None, map(_cpu_sentence, machines)),
        "Recipe: every answer checked, then median of interleaved CUDA graph replays, cold buffers "
        "rotated through more than twice the L2; host: the best of three processes.",
        "\n".join(f"- {origin(results)}" for results in machines),
        "[docs/benchmarks.md](docs/benchmarks.md) has the pictures, every case, the targets that "
        "were met and missed, and how to measure on your machine.",
    ]
    return "\n\n".join(paragraphs)


def docs(machines: Sequence[Results]) -> str:
    if not machines:
        return NO_RESULTS
    paragraphs = ["\n".join(f"- {origin(results)}" for results in machines)]
    paragraphs += _other_sources([results for results in machines if results.environment["gpu"]])
    for picture in _pictures(machines, PICTURES, "benchmarks"):
        paragraphs += [f"### {picture.partition(']')[0][2:]}", picture]
    for results in machines:
        paragraphs += [f"### Targets, {results.gpu}", _targets(results)]
    for results in machines:
        paragraphs += [f"### Every case, {results.gpu}", *_every_case(results)]
    return "\n\n".join(paragraphs)


def _other_sources(machines: Sequence[Results]) -> Iterator[str]:
    """Says which columns and panels are of other sources than the first one's."""
    trees = [results.environment["trees"]["csrc"] for results in machines]
    named = [one.gpu for one, tree in zip(machines, trees, strict=True) if tree != trees[0]]
    if named:
        yield f"{_joined(named)}: measured with other sources than {machines[0].gpu}."


def _pictures(machines: Sequence[Results], names: Iterable[str], folder: str) -> Iterator[str]:
    """Those that have something to show."""
    for name in names:
        if any(ROWS[name](machines)):
            yield f"![{PICTURES[name]}]({folder}/{name}.svg)"


def _joined(values: Iterable[str | None]) -> str:
    """Without what is not known, and each once."""
    return " and ".join(dict.fromkeys(filter(None, values)))


def _times(value: float | None) -> str:
    if value is None:
        return "-"
    digits = 3 if 0.995 <= value < 1.005 else 2  # a loss is not rounded away
    return f"{value:.{digits}f}x"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.1f} %"


def _shapes_table(machines: Sequence[Results]) -> str:
    header = ["bf16, tokens x heads x head size", "", "MB"]
    for results in machines:
        header += [f"{results.gpu}: us", "of the limit", "over vLLM"]
    rows = []
    for group, case, regime in SHOWN:
        found = [results.find(group, case, regime, "ours") for results in machines]
        known: Record | None = next((record for record in found if record), None)
        if known is None:
            continue
        row = [case.removesuffix(" bf16"), regime, megabytes(known["bytes"])]
        for results, record in zip(machines, found, strict=True):
            if record is None or "status" in record:
                row += [record["status"] if record else "-", "-", "-"]
                continue
            row += [
                microseconds(results.us(record)),
                _percent(results.of_limit(record)),
                _times(results.speed_up(record, "vllm")),
            ]
        rows.append(row)
    return markdown(header, rows)


def _summary(results: Results) -> str:
    """Every case at once, its worst ones by name."""
    speed_ups, shares = [], []
    for group in SHAPED[:-1]:  # all but the CPU's
        for record in results.ours(group):
            name = case_title(record)
            speed_up, share = results.speed_up(record, "vllm"), results.of_limit(record)
            speed_ups += [(speed_up, name)] if speed_up else []
            shares += [(share, name)] if share else []
    said = []
    for what, values, show in (
        ("of the limit", shares, _percent),
        ("over vLLM", speed_ups, _times),
    ):
        if values:
            (low, worst), (high, best) = min(values), max(values)
            median = statistics.median(value for value, _ in values)
            said.append(
                f"{what} median {show(median)}, from {show(low)} ({worst}) to {show(high)} "
                f"({best}), {len(values)} cases"
            )
    return f"All cases, {results.gpu}: {'; '.join(said)}."


def _host_table(machines: Sequence[Results]) -> str:
    header = ["", *(results.gpu for results in machines)]
    rows = []
    for provider, title in TITLES.items():
        times = [host_times(results, provider) for results in machines]
        if any(times):
            rows.append([title, *(" / ".join(one) if one else "-" for one in times)])
    return markdown(header, rows)


def _cpu_sentence(results: Results) -> str:
    large = [record for record in results.ours("cpu") if record["tokens"] > 1]
    said = [
        f"{record.get('dtype', 'bfloat16')} "
        f"{number(results.of_limit(record))}, {_times(results.speed_up(record, 'eager'))}"
        for record in large
    ]
    if not said:
        return ""
    run = results.runs["cpu"]
    beside = f", beside the {results.gpu}" if results.environment["gpu"] else ""
    return (
        f"CPU at 100 MB ({run['cpu']}, {run['threads']} threads{beside}), of "
        f"torch.add(out=)'s bandwidth, and time of the formula in eager PyTorch over ours: "
        f"{'; '.join(said)}."
    )


def origin(results: Results) -> str:
    """Machine, versions, date and sources of a results file."""
    environment, runs = results.environment, results.runs.values()
    dates = sorted({run["date"] for run in runs})
    when = dates[0] if len(dates) == 1 else f"{dates[0]} to {dates[-1]}"
    commits = ", ".join(dict.fromkeys(str(run["commit"])[:10] for run in runs))
    trees = ", ".join(f"{tree} {str(h)[:10]}" for tree, h in environment["trees"].items())
    changed = ", with changes that are not committed" if environment["dirty"] else ""
    others = [
        f"{title} {environment[name]}"
        for name, title in (("vllm", "vLLM"), ("flashinfer", "FlashInfer"))
        if environment[name]
    ]
    driver = [f"driver {environment['driver']}"] if environment["driver"] else []
    versions = [*driver, f"PyTorch {environment['torch']}", *others]
    return (
        f"{environment['gpu'] or 'no GPU'}{_clocks(results)}, {', '.join(versions)}; {when}, "
        f"commit {commits} ({trees}){changed}"
    )


def _clocks(results: Results) -> str:
    """Of the SMs and the memory while the GPU copied, over all groups."""
    said = []
    for clock, name in (("clocks.sm", "SM"), ("clocks.mem", "memory")):
        values = [run["clocks"].get(clock, "").split() for run in results.runs.values()]
        numbers = sorted({int(value[0]) for value in values if value and value[0].isdigit()})
        if numbers:
            spread = dict.fromkeys(str(n) for n in (numbers[0], numbers[-1]))
            said.append(f"{name} {'-'.join(spread)} MHz")
    return f" ({', '.join(said)})" if said else ""


def _targets(results: Results) -> str:
    header = ("target", "asked", "measured", "", "worst case")
    rows = []
    for one in outcomes(results):
        met = {True: "met", False: "**missed**", None: "-"}[one.met]
        rows.append((one.text, one.asked, number(one.measured, 4), met, one.case))
    return markdown(header, rows)


def _every_case(results: Results) -> Iterator[str]:
    for group in ALL_GROUPS:
        ours = results.ours(group)
        if group == "host" or not ours:
            continue
        table = markdown(CASE_HEADER, [case_row(results, record) for record in ours])
        yield f"<details><summary>{group}, {len(ours)} cases</summary>\n\n{table}\n\n</details>"
