"""One engine that merges across ranks, as process.py has them: its workers see the same rounds.

Not the profiled one: what vLLM's own way takes of a GPU lies in NCCL's kernels, which others call
too. CUDA graphs keep what they were captured with, so that such an engine has one of both to time.
"""

from __future__ import annotations

import itertools
from typing import Any

from . import workers
from .rounds import Round, all_differences, compared, in_turn
from .scenarios import Answers, Engine, Scenario


def run(scenario: Scenario, model: str) -> dict[str, Any]:
    engine = Engine(scenario, model)
    first = engine.answer()
    state = engine.plugin_in_worker()
    transports = f", {' and '.join(state['transports'])}" if state["transports"] else ""
    found = {"title": scenario.title + transports, "plugin": state, "first": first}
    if scenario.graphs:
        found |= timed_with_graphs(engine, "vllm" if state["across_ranks"] else "ours")
    elif not state["across_ranks"]:
        found |= watched_in_workers(engine, first)
    return found | {"fallbacks": engine.plugin_in_worker()["fallbacks"]}


def round_in_workers(engine: Engine, way: str) -> tuple[list[list[Any]], Answers, list[float]]:
    """What each worker sees, the answers, and each step's microseconds."""
    steps: list[float] = []
    engine.in_workers(workers.watch, way)
    with engine.timed_steps(steps):
        answers = engine.answer()
    return engine.in_workers(workers.seen), answers, steps


def watched_in_workers(engine: Engine, first: Answers) -> dict[str, Any]:
    """The rounds of an eager engine, of whose merges each is a call."""
    (case,) = engine.scenario.merges
    seen, checked_answers, _ = round_in_workers(engine, "checked")
    sizes: dict[tuple[int, int], list[workers.Checked]] = {}
    for call in itertools.chain(*seen):
        sizes.setdefault((call.heads, call.head_size), []).append(call)
    checked = [
        {"case": case, "result": "output", "heads": heads, "head_size": head_size}
        | {"tokens": sorted({call.tokens for call in alike})}
        | compared([call.ours for call in alike], [call.theirs for call in alike],
                   max(call.rounding for call in alike))
        for (heads, head_size), alike in sizes.items()
    ]  # fmt: skip

    def timed(provider: str) -> tuple[Round, Answers]:
        (us, *_), answers, steps = round_in_workers(engine, provider)  # of rank 0
        return {"calls_us": {case: us}, "steps_us": steps}, answers

    rounds, answers = in_turn(("ours", "vllm"), timed)
    _, exact, _ = round_in_workers(engine, "float64")
    return {
        "checked": checked,
        "rounds": rounds,
        "answers": {"ours": answers["ours"][0], "vllm": answers["vllm"][0], "float64": exact},
        "differences": all_differences(answers, exact, first, checked_answers),
    }


def timed_with_graphs(engine: Engine, provider: str) -> dict[str, Any]:
    """Steps' times of an engine that replays its merges, and how many kernels of ours it ran."""

    def timed(_: str) -> tuple[Round, Answers]:
        steps: list[float] = []
        with engine.timed_steps(steps):
            answers = engine.answer()
        return {"calls_us": {}, "steps_us": steps}, answers

    rounds, answers = in_turn([provider], timed)
    engine.in_workers(workers.profile)
    engine.answer()
    kernels = engine.in_workers(workers.profiled)
    first, *_, last = answers[provider]
    return {"rounds": rounds, "answers": {provider: first}, "last": last, "kernels": min(kernels)}
