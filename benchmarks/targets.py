"""How results do against what we ask of ourselves (targets.json), met or missed.

A target is a list of figures, one a case: the time of `of` over that of `over`, or less that of
`less`, where "contiguous" is our own time of the same size with nothing special about it, and
"ring step" that of a whole step. Its
bound, `at_most` or `at_least`, is a number or one for each size. It is met where every case meets
it; a case that `noise_us` less of our time would bring to its bound is "within noise". Figures are
taken within each process (results.py).
"""

import json
import operator
from pathlib import Path
from typing import Any

from .results import Record, Results, compared, times_of
from .tables import AT_THE_LIMIT, Table, number

Target = dict[str, Any]
TARGETS: list[Target] = json.loads(Path(__file__).with_name("targets.json").read_text("utf-8"))
VERDICTS = ("met", "within noise", "missed")


def targets_table(results: Results) -> Table:
    """Every target that is set for this machine, by its worst case; a bound a row."""
    rows, everywhere = [], [results.gpu.rpartition(" x ")[2]]  # but not on several GPUs
    for target in TARGETS:
        sign, bounds = (1, target["at_most"]) if "at_most" in target else (-1, target["at_least"])
        of_size = isinstance(bounds, dict)
        for size, bound in bounds.items() if of_size else [("", bounds)]:
            if results.gpu in target.get("gpus", everywhere):
                text = f"{target['text']}, {size}" if of_size else target["text"]
                where = target["where"] | ({"size": [size]} if of_size else {})
                worst = _worst(target, where, sign, bound, results)
                rows.append([text, f"{'<=' if sign > 0 else '>='} {bound:g}", *worst])
    return ("target", "asked", "measured", "", "worst case"), rows


def _worst(
    target: Target, where: dict[str, list[Any]], sign: int, bound: float, results: Results
) -> tuple[str, str, str]:
    """What was measured, the verdict and the case, of the worst case."""
    named = (str(target["of"]), target.get("over", ""))
    ours = next((name for name in named if name.startswith("ours ")), "ours")  # which way of ours
    judged = []
    for record in results.select(target["group"]):
        if any(record.get(field) not in values for field, values in where.items()):
            continue
        if why := record["refused"].get(ours):
            return "-", "missed", f"{record['case']}: {why}"
        for provider in target["of"] if isinstance(target["of"], list) else [target["of"]]:
            value = _figure(target, record, provider, results, 0.0)
            lenient = _figure(target, record, provider, results, target.get("noise_us", 0.0))
            if value is not None and lenient is not None:
                bad = (sign * (value - bound) > 0) + (sign * (lenient - bound) > 0)
                who = "" if provider in ("ours", target["of"]) else f", {provider}"
                passed = "limit" in (target["of"], target.get("over")) and sign * (value - 1) <= 0
                shown = AT_THE_LIMIT if passed else number(value, 3)
                judged.append((bad, sign * value, shown, record["case"] + who))
    if not judged:
        return "-", "-", "not measured"
    bad, _, shown, case = max(judged)
    return shown, VERDICTS[bad], case


def _figure(
    target: Target, record: Record, provider: str, results: Results, noise_us: float
) -> float | None:
    """The figure, as it would be if our time were so many microseconds less."""
    against = target.get("over") or target["less"]
    times, bases = times_of(record, provider), times_of(record, against)
    if against in ("contiguous", "ring step"):
        bases = times_of(results.contiguous(record, against), "ours")
    times = [us - noise_us for us in times] if provider == "ours" else times
    bases = [us - noise_us for us in bases] if against == "ours" else bases
    return compared(times, bases, operator.truediv if "over" in target else operator.sub)
