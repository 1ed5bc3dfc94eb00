"""What a target is, and the figures that targets are about."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from .results import Record, Results

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


def cases(*names: str) -> Chosen:
    """By the beginning of the name: a shape, or a shape and a dtype."""
    return lambda r: bool(r["case"].startswith(names))


def of_megabytes(more_than: float, less_than: float, regime: str | None = None) -> Chosen:
    return lambda r: more_than < r["bytes"] / 1e6 < less_than and regime in (None, r["regime"])


def in_regime(regime: str) -> Chosen:
    return lambda r: bool(r["regime"] == regime)


def everything(record: Record) -> bool:
    return True


def both(limit: float) -> dict[str, float]:
    return {"H200": limit, "H100": limit}


def each(h200: float, h100: float) -> dict[str, float]:
    return {"H200": h200, "H100": h100}
