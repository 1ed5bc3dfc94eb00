"""Writes what was measured inside vLLM into docs/vllm.md: `python -m in_vllm.report`.

All of it follows from benchmarks/results/vllm/*.json: --check says whether the page is what they
give.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from benchmarks.environment import ROOT
from benchmarks.report import NO_RESULTS, RESULTS, origin, replaced
from benchmarks.results import Record, Results
from benchmarks.tables import markdown, microseconds, number

from .patterns import PATTERNS, TOKENS
from .records import load, speed_up, us
from .scenarios import SCENARIOS

FOLDER = RESULTS / "vllm"
PAGE = Path("docs", "vllm.md")
ENGINE_CASES = "share"  # a regime that only an engine's results have
# Warm: a merge after a merge, its inputs in L2, as older files have it.
DEVICE_REGIMES = {"neighbours": "added between neighbours", "cold": "cold", "warm": "warm"}
NO_RANKS = "No two GPUs have measured it yet: `make vllm-engine` does."
RUN = "what the engine runs"
HOSTS = (RUN, "merge", "calls timed", "host us a call, without", "with", "")
SHARES = (
    *(RUN, "merges a round", "GPU us a merge, without", "with"),
    *("ms a step (quartiles), without", "with", "share of the wall time, without", "with"),
    *("share of the GPU's time, without", "with"),
)
ERRORS = (
    *(RUN, "merge", "result", "calls checked", "tokens"),
    *("furthest from float64, without", "with", "with it further off"),
)
ANSWERS = (RUN, "two runs", "the same tokens", "log-probabilities compared", "furthest apart")


def is_of_engine(results: Results) -> bool:
    return any(record["regime"] == ENGINE_CASES for record in results.records)


def section(machines: Sequence[Results]) -> str:
    """Everything between the page's markers."""
    if not machines:
        return NO_RESULTS
    gains = [results for results in machines if not is_of_engine(results)]
    gains.sort(key=lambda results: results.environment["gpu"] is None)
    engines = [results for results in machines if is_of_engine(results)]
    paragraphs = ["### At the dispatcher"]
    for results in gains:
        paragraphs += [f"#### {results.gpu}", f"{origin(results)}.", *host(results)]
        paragraphs += device(results) if "device" in results.runs else []
    for title, across_ranks in (("In the engine", False), ("In the engine, across ranks", True)):
        shown = []
        for results in engines:
            if groups := groups_of(results, across_ranks):
                shown += [f"#### {results.gpu}", f"{origin(results)}.", *engine(results, groups)]
        if across_ranks and not shown:
            shown = [NO_RANKS]
        paragraphs += [f"### {title}", *shown]
    return "\n\n".join(paragraphs)


def groups_of(results: Results, across_ranks: bool) -> list[str]:
    return [name for name in results.runs if (SCENARIOS[name].ranks > 1) == across_ranks]


def pair(results: Results, group: str, case: str, regime: str) -> list[str]:
    """Without and with the plugin, and the one over the other."""
    ours, theirs = (
        next(iter(results.select(group, case=case, regime=regime, provider=provider)), None)
        for provider in ("ours", "vllm")
    )
    if ours is None or theirs is None:
        return ["-", "-", "-"]
    over = speed_up(ours, theirs)
    before = theirs.get("status") or microseconds(us(theirs))
    after = microseconds(us(ours))
    return [before, after, "-" if over is None else f"{over:.2f}x"]


def host(results: Results) -> Iterator[str]:
    header = ["microseconds of the host a call", "tight, without", "with", "", "swept, without"]
    header += ["with", ""]
    rows = []
    for pattern in PATTERNS:
        tight, swept = (
            pair(results, "host", pattern.name, regime) for regime in ("tight", "swept")
        )
        gpu = results.environment["gpu"]
        triton = " (Triton without)" if pattern.goes_to_triton and gpu else ""
        rows.append([pattern.name + triton, *tight, *swept])
    yield markdown(header, rows)
    reasons = {
        record["reason"] for record in results.select("host") if record.get("status") == "failed"
    }
    yield from (f"failed: {reason}" for reason in sorted(reasons))


def device(results: Results) -> Iterator[str]:
    regimes = [one for one in DEVICE_REGIMES if results.select("device", regime=one)]
    header = ["microseconds of the GPU a call", "tokens"]
    for regime in regimes:
        header += [f"{DEVICE_REGIMES[regime]}, without", "with", ""]
    rows = []
    for pattern in PATTERNS:
        for tokens in TOKENS:
            case = f"{pattern.name}, {tokens} tokens"
            times = (cell for one in regimes for cell in pair(results, "device", case, one))
            rows.append([pattern.name, f"{tokens:,}", *times])
    yield markdown(header, rows)


def engine(results: Results, groups: Sequence[str]) -> Iterator[str]:
    hosts, shares, errors, answers = [], [], [], []
    for group in groups:
        run = results.runs[group]
        records = results.select(group)
        hosts += [[run["title"], *host] for host in _hosts(results, records)]
        shares.append([run["title"], *_shares(records)])
        errors += [[run["title"], *error] for error in _errors(records)]
        answers += [[run["title"], *answer] for answer in _answers(records)]
    yield markdown(HOSTS, hosts)
    yield markdown(SHARES, shares)
    yield markdown(ERRORS, errors)
    yield markdown(ANSWERS, answers)


def _hosts(results: Results, records: Sequence[Record]) -> Iterator[list[str]]:
    for record in records:
        if (record["regime"], record["provider"]) == ("host", "ours"):
            times = pair(results, record["group"], record["case"], "host")
            yield [record["case"], str(record["calls"]), *times]


def _shares(records: Sequence[Record]) -> Iterator[str]:
    """Of all merges of an engine together."""
    share = {r["provider"]: r for r in records if r["regime"] == ENGINE_CASES}
    yield str(share["ours"].get("merges", "-"))  # a CUDA graph's are nobody's calls
    both = [share[provider] for provider in ("vllm", "ours")]
    yield from (microseconds(one.get("gpu_us_a_merge")) for one in both)
    yield from (_step(one) for one in both)
    yield from (_percent(one.get("merge_share_of_wall")) for one in both)
    yield from (_percent(one.get("merge_share_of_gpu")) for one in both)


def _errors(records: Sequence[Record]) -> Iterator[list[str]]:
    for record in records:
        if not record["regime"].startswith("error"):
            continue
        tokens = sorted(record["tokens"])
        span = f"{tokens[0]:,}" + (f" to {tokens[-1]:,}" if len(tokens) > 1 else "")
        further = f"{record['further_off']} of {record['calls']}"
        if record["further_off"]:
            further += f", by {record['largest_excess']:.1e} at most"
        yield [
            record["case"], record["result"], str(record["calls"]), span,
            f"{record['vllm']:.3e}", f"{record['ours']:.3e}", further,
        ]  # fmt: skip


def _answers(records: Sequence[Record]) -> Iterator[list[str]]:
    for record in records:
        if record["regime"] == "answers":
            same = f"{record['same_tokens']} of {record['tokens']}"
            apart = number(record["largest_logprob_difference"], 4)
            yield [record["case"], same, str(record["compared_logprobs"]), apart]


def _step(record: Record) -> str:
    """Milliseconds and their quartiles: "5.57 (5.49-5.66)"."""
    names = ("step_us", "step_low_us", "step_high_us")
    median, low, high = (number(record[name] / 1e3) for name in names)
    return f"{median} ({low}-{high})"


def _percent(value: float | None) -> str:
    return "-" if value is None else f"{100 * value:.2f} %"


def published() -> list[Results]:
    """The files that the page shows."""
    return load(list(FOLDER.glob("*.json")))


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    options = parser.parse_args(arguments)
    path = ROOT / PAGE
    text = path.read_text("utf-8")
    made = replaced(text, section(published()), str(PAGE))
    if options.check:
        print("published as measured" if made == text else f"{PAGE} is not what the results give")
        return int(made != text)
    path.write_text(made, "utf-8")
    print(path)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
