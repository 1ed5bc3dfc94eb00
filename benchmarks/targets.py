"""What we ask of ourselves, as data, and how a results file does against it.

A target is met where its worst case meets it. Both are published, met or not.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from .results import Record, Results
from .tables import number, plain

Value = Callable[[Results, Record], "float | None"]
Chosen = Callable[[Record], bool]


@dataclass(frozen=True)
class Target:
    """Limits by the GPU's name; at_least: the figure may not be smaller, else not larger."""

    text: str
    group: str
    chosen: Chosen
    value: Value
    limits: dict[str, float]
    at_least: bool = True
    provider: tuple[str, ...] = ("ours",)


class Outcome(NamedTuple):
    """`measured` is the worst of the cases, `case` which one that is; None: not measured."""

    text: str
    asked: str
    measured: float | None
    case: str
    met: bool | None


def of_limit(results: Results, record: Record) -> float | None:
    return results.of_limit(record)


def over(provider: str) -> Value:
    """Another provider's time over ours."""
    return lambda results, record: results.speed_up(record, provider)


def share_of(provider: str) -> Value:
    """Our time over another provider's."""

    def value(results: Results, record: Record) -> float | None:
        speed_up = results.speed_up(record, provider)
        return 1 / speed_up if speed_up else None

    return value


def above(provider: str) -> Value:
    """Microseconds of ours that another provider does not need."""

    def value(results: Results, record: Record) -> float | None:
        ours, theirs = results.us(record), results.us(results.of(record, provider))
        return ours - theirs if ours is not None and theirs is not None else None

    return value


def share_of_plain(results: Results, record: Record) -> float | None:
    """Our time over ours for the same shape with nothing special about it."""
    plain_case = record["case"].partition(",")[0]
    base = results.us(results.find(record["group"], plain_case, record["regime"], "ours"))
    ours = results.us(record)
    return ours / base if ours is not None and base else None


def cases(*names: str, regime: str | None = None) -> Chosen:
    """By the beginning of the name: a shape, or a shape and a dtype."""
    return lambda r: r["case"].startswith(names) and regime in (None, r["regime"])


def everything(record: Record) -> bool:
    return True


def both(limit: float) -> dict[str, float]:
    return {"H200": limit, "H100": limit}


def each(h200: float, h100: float) -> dict[str, float]:
    return {"H200": h200, "H100": h100}


SMALL = ("1x128x128", "16x16x128", "64x16x128", "256x16x128")
LITTLE = ("64x16x128", "256x16x128")  # 0.8 and 3.2 MB
OURS = ("ours", "ours_keyword")
ANY_MACHINE = ""

TARGETS = (
    Target("of the triad, cold, 12 MB and more", "sweep", everything, of_limit, both(0.985)),
    Target(
        "of the triad, warm, 13 to 26 MB, D = 64, 128, 256, 512",
        "warm",
        lambda r: r["head_size"] in (64, 128, 256, 512),
        of_limit,
        each(0.92, 0.95),
    ),
    Target(
        "of the triad, warm, 19 MB, D = 96, 192",
        "warm",
        lambda r: r["head_size"] in (96, 192),
        of_limit,
        each(0.93, 0.92),
    ),
    Target("of the triad, up to 3.2 MB", "small", cases(*SMALL), of_limit, both(0.97)),
    Target(
        "vLLM's time over ours, cold, 818 MB",
        "sweep",
        cases("8192x128x128 bf16"),
        over("vllm"),
        each(1.05, 1.01),
    ),
    Target(
        "vLLM's time over ours, cold, 102 MB",
        "sweep",
        cases("8192x16x128 bf16"),
        over("vllm"),
        each(1.10, 1.03),
    ),
    Target(
        "vLLM's time over ours, cold, 25 MB",
        "sweep",
        cases("2048x16x128 bf16"),
        over("vllm"),
        each(1.16, 1.12),
    ),
    Target(
        "vLLM's time over ours, cold, 0.8 and 3.2 MB",
        "small",
        cases(*LITTLE, regime="cold"),
        over("vllm"),
        each(1.28, 1.35),
    ),
    Target(
        "vLLM's time over ours, warm, 25 MB",
        "warm",
        cases("2048x16x128"),
        over("vllm"),
        each(1.42, 1.42),
    ),
    Target(
        "vLLM's time over ours, warm, 0.8 and 3.2 MB",
        "small",
        cases(*LITTLE, regime="warm"),
        over("vllm"),
        each(1.48, 1.45),
    ),
    Target(
        "time over a full merge, half the tokens have context",
        "context",
        lambda r: "context_tokens" in r and not r.get("in_place"),
        share_of_plain,
        both(0.87),
        at_least=False,
    ),
    Target(
        "the same in place on suffix_output",
        "context",
        lambda r: bool(r.get("in_place")),
        share_of_plain,
        both(0.60),
        at_least=False,
    ),
    Target(
        "time over dense, half of the prefix rows empty",
        "empties",
        lambda r: bool(r.get("empty_blocks")),
        share_of_plain,
        both(1.0),
        at_least=False,
    ),
    Target(
        "FP8 output, of a triad that writes as little",
        "layouts",
        lambda r: "output_dtype" in r,
        of_limit,
        both(0.95),
    ),
    Target(
        "[H, N, D] storage and padded heads, of the triad",
        "layouts",
        lambda r: r.get("layout") in ("heads first", "padded heads"),
        of_limit,
        both(0.95),
    ),
    Target("generic, D = 100", "layouts", cases("8192x32x100"), of_limit, both(0.60)),
    Target(
        "generic, D = 128, 8-byte aligned",
        "layouts",
        lambda r: r.get("layout") == "8-byte aligned",
        of_limit,
        both(0.85),
    ),
    Target("generic, FP8 inputs", "layouts", cases("8192x32x128 e4m3"), of_limit, both(0.60)),
    Target(
        "eager call, time over torch.add(out=)",
        "host",
        lambda r: r["regime"] == "tight",
        share_of("add"),
        each(0.70, 0.85),
        at_least=False,
        provider=OURS,
    ),
    Target(
        "eager call, time over vLLM behind its dispatcher",
        "host",
        lambda r: r["regime"] == "tight",
        share_of("vllm_dispatcher"),
        each(0.42, 0.55),
        at_least=False,
        provider=OURS,
    ),
    Target(
        "eager call, us above a bare launch",
        "host",
        lambda r: r["regime"] == "tight",
        above("bare_launch"),
        each(1.0, 1.5),
        at_least=False,
        provider=OURS,
    ),
    Target(
        "eager call, swept, time over torch.add(out=)",
        "host",
        lambda r: r["regime"] == "swept",
        share_of("add"),
        both(0.55),
        at_least=False,
        provider=OURS,
    ),
    Target(
        "eager call, swept, time over vLLM behind its dispatcher",
        "host",
        lambda r: r["regime"] == "swept",
        share_of("vllm_dispatcher"),
        both(0.42),
        at_least=False,
        provider=OURS,
    ),
    Target(
        "torch.ops call, time over torch.add(out=)",
        "host",
        lambda r: r["regime"] == "tight",
        share_of("add"),
        both(1.4),
        at_least=False,
        provider=("ours_ops",),
    ),
    Target(
        "CPU, 100 MB, of torch.add's bandwidth",
        "cpu",
        lambda r: r["tokens"] > 1,
        of_limit,
        {ANY_MACHINE: 0.9},
    ),
    Target(
        "CPU, 100 MB, time of the formula in eager PyTorch over ours",
        "cpu",
        lambda r: r["tokens"] > 1,
        over("eager"),
        {ANY_MACHINE: 3.0},
    ),
    Target(
        "CPU, 4 KB, time of the formula in eager PyTorch over ours",
        "cpu",
        lambda r: r["tokens"] == 1,
        over("eager"),
        {ANY_MACHINE: 1.0},
    ),
)


def outcomes(results: Results) -> Iterator[Outcome]:
    """Every target that is set for this machine."""
    for target in TARGETS:
        limit = target.limits.get(results.gpu, target.limits.get(ANY_MACHINE))
        if limit is None:
            continue
        values = []
        for record in results.select(target.group, target.chosen):
            if record["provider"] in target.provider:
                value = target.value(results, record)
                if value is not None:
                    values.append((value, f"{record['case']} {record['regime']}"))
        worst, case = (min if target.at_least else max)(values, default=(None, "not measured"))
        met = None if worst is None else worst >= limit if target.at_least else worst <= limit
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
