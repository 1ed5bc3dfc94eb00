"""How results do against what we ask of ourselves (targets.json), met or missed.

A target is a list of figures, one a case: the time of `of` over that of `over`, or less that of
`less`, where "contiguous" is our own time of the same size with nothing special about it. Its
bound, `at_most` or `at_least`, is a number or one for each size. It is met where every case meets
it; a case that `noise_us` less of our time would bring to its bound is "within noise".
"""

import json
from pathlib import Path
from typing import Any

from .results import Record, Results, time_of
from .tables import Table, number

Target = dict[str, Any]
TARGETS: list[Target] = json.loads(Path(__file__).with_name("targets.json").read_text("utf-8"))
VERDICTS = ("met", "within noise", "missed")


def targets_table(results: Results) -> Table:
    """Every target that is set for this machine, by its worst case."""
    rows = []
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
        worst = max(judged, key=lambda one: one[0], default=(None, ["", "-", "-", "not measured"]))
        rows.append([target["text"], *worst[1]])
    return ("target", "asked", "measured", "", "worst case"), rows


def _judge(
    target: Target, record: Record, provider: str, results: Results
) -> tuple[tuple[int, float], list[str]] | None:
    """How bad a case is, and its cells of the table; None where the target is not about it."""
    sign, bound = (1, target["at_most"]) if "at_most" in target else (-1, target["at_least"])
    if isinstance(bound, dict):
        bound = bound.get(record.get("size"))
    value = _figure(target, record, provider, results, 0.0)
    lenient = _figure(target, record, provider, results, target.get("noise_us", 0.0))
    if bound is None or (value is None and "ours" not in record["refused"]):
        return None
    asked = f"{'<=' if sign > 0 else '>='} {bound:g}"
    case = record["case"] if isinstance(target["of"], str) else f"{record['case']}, {provider}"
    if value is None or lenient is None:
        return (len(VERDICTS), 0.0), [asked, "-", "missed", f"{case}: {record['refused']['ours']}"]
    bad = (sign * (value - bound) > 0) + (sign * (lenient - bound) > 0)
    return (bad, sign * (value - bound) / bound), [asked, number(value, 3), VERDICTS[bad], case]


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
