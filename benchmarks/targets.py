"""How results do against what we ask of ourselves (targets.json), met or missed.

A target is a list of figures, one a case: the time of `of` over that of `over`, or less that of
`less`, where "contiguous" is our own time of the same size with nothing special about it. Its
bound, `at_most` or `at_least`, is a number or one for each size. It is met where every case meets
it; a case that `noise_us` less of our time would bring to its bound is "within noise".
"""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from .results import Record, Results, time_of
from .tables import Row, number

TARGETS: list[dict[str, Any]] = json.loads(
    Path(__file__).with_name("targets.json").read_text("utf-8")
)
VERDICTS = ("met", "within noise", "missed")
Target = dict[str, Any]


class Outcome(NamedTuple):
    """Of a target's worst case; `measured` is None where nothing was, or where ours was wrong."""

    text: str
    asked: str
    measured: float | None
    verdict: str  # met, within noise, missed; "-": not measured
    case: str


def outcomes(results: Results) -> Iterator[Outcome]:
    """Every target that is set for this machine."""
    for target in TARGETS:
        if results.gpu not in target.get("gpus", [results.gpu]):
            continue
        providers = target["of"] if isinstance(target["of"], list) else [target["of"]]
        judged = [
            outcome
            for record in results.select(target["group"])
            if all(record.get(field) in values for field, values in target["where"].items())
            for provider in providers
            if (outcome := _judge(target, record, provider, results))
        ]
        nothing = Outcome(target["text"], "", None, "-", "not measured")
        yield max(judged, key=lambda one: one[0])[1] if judged else nothing


def _judge(
    target: Target, record: Record, provider: str, results: Results
) -> tuple[tuple[int, float], Outcome] | None:
    """How bad a case is, and its outcome; None where the target is not about it."""
    at_most = "at_most" in target
    bound = target["at_most" if at_most else "at_least"]
    if isinstance(bound, dict):
        bound = bound.get(record.get("size"))
    if bound is None:
        return None
    case = record["case"] if isinstance(target["of"], str) else f"{record['case']}, {provider}"
    asked = f"{'<=' if at_most else '>='} {bound:g}"
    if why := record["refused"].get("ours"):
        return (len(VERDICTS), 0.0), Outcome(
            target["text"], asked, None, "missed", f"{case}: {why}"
        )

    def excess(value: float) -> float:
        return value - bound if at_most else bound - value

    value = _figure(target, record, provider, results, 0.0)
    lenient = _figure(target, record, provider, results, target.get("noise_us", 0.0))
    if value is None or lenient is None:
        return None
    verdict = VERDICTS[(excess(value) > 0) + (excess(lenient) > 0)]
    outcome = Outcome(target["text"], asked, value, verdict, case)
    return (VERDICTS.index(verdict), excess(value) / bound), outcome


def _figure(
    target: Target, record: Record, provider: str, results: Results, noise_us: float
) -> float | None:
    """The figure, as it would be if our time were so many microseconds less."""
    against = target.get("over") or target["less"]
    time, base = time_of(record, provider), time_of(record, against)
    if against == "contiguous":
        base = time_of(results.contiguous(record), "ours")
    if time is None or base is None:
        return None
    time -= noise_us if provider == "ours" else 0.0
    base -= noise_us if against == "ours" else 0.0
    return time / base if "over" in target else time - base


def targets_table(results: Results) -> tuple[Row, list[Row]]:
    """A target a row."""
    rows = [
        (one.text, one.asked, number(one.measured, 3), one.verdict, one.case)
        for one in outcomes(results)
    ]
    return ("target", "asked", "measured", "", "worst case"), rows
