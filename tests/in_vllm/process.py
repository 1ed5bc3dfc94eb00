"""One engine, started as a user starts it: `python -m in_vllm.process NAME MODEL`.

The last line is what was seen, in JSON. vLLM finds the plugin by its entry point; the first answers
come from an engine that nothing of this folder has touched. With --as-served that is all: such an
engine merges in another process. Else, in the same engine:

| round    | merges                                                                              |
| -------- | ----------------------------------------------------------------------------------- |
| checked  | every call twice, through the plugin and through vLLM's own, both against float64   |
| timed    | with the plugin and without, in turn: host time of each call and of each step       |
| profiled | once each: GPU time of the merge and of everything                                  |
| float64  | every call in float64, rounded once: what the answers are measured against          |

Merges across ranks are watched where they are made (across_ranks.py).
"""

from __future__ import annotations

import argparse
import json
import os
from typing import Any

from . import across_ranks
from .dispatcher import Merge, patched, unpatched
from .rounds import all_differences, compared, in_turn
from .scenarios import AS_SERVED, ENVIRONMENT, SCENARIOS, WATCHED, Answers, Engine, Scenario
from .watch import (
    Checked,
    Errors,
    Kind,
    checking,
    merging_in_float64,
    standing_in,
    timing,
)


def check_round(engine: Engine) -> tuple[list[dict[str, Any]], Answers]:
    """Check every call; for each kind of call and each result, how far off ours and theirs were at
    the most, and how often ours was further off.
    """
    calls: list[Checked] = []
    with standing_in(checking(calls)):
        answers = engine.answer()
    kinds: dict[Kind, list[Checked]] = {}
    for call in calls:
        kinds.setdefault(call.kind, []).append(call)
    return [
        {"case": engine.scenario.name_of(kind.has_output_lse), "result": result}
        | kind._asdict()
        | {"tokens": sorted({call.tokens for call in alike})}
        | compared([getattr(call.ours, result) for call in alike],
                   [getattr(call.theirs, result) for call in alike])
        for kind, alike in kinds.items()
        for result in Errors._fields[: 1 + kind.has_output_lse]
    ], answers  # fmt: skip


def timed_round(engine: Engine, merge: Merge) -> tuple[dict[str, Any], Answers]:
    calls: list[tuple[bool, float]] = []
    steps: list[float] = []
    with standing_in(timing(merge, calls)), engine.timed_steps(steps):
        answers = engine.answer()
    by_kind: dict[str, list[float]] = {}
    for has_lse, us in calls:
        by_kind.setdefault(engine.scenario.name_of(has_lse), []).append(us)
    return {"calls_us": by_kind, "steps_us": steps}, answers


def profiled_round(engine: Engine, merge: Merge) -> dict[str, float]:
    """GPU microseconds of the merge's kernels and of all, and how many merges there were."""
    from torch.profiler import ProfilerActivity, profile

    with standing_in(merge), profile(activities=[ProfilerActivity.CUDA]) as profiler:
        engine.answer()
    kernels = [event for event in profiler.key_averages() if event.device_time_total > 0]
    merges = [event for event in kernels if "merge_attn_states" in event.key]
    return {
        "all_us": sum(event.self_device_time_total for event in kernels),
        "merge_us": sum(event.self_device_time_total for event in merges),
        "merges": sum(event.count for event in merges),
    }


def run(scenario: Scenario, model: str) -> dict[str, Any]:
    from merge_attn_states.integrations import vllm as plugin

    engine = Engine(scenario, model)
    first = engine.answer()
    state = plugin.status()
    found = {"title": scenario.title, "plugin": state._asdict(), "first": first}
    if not state.active:  # taken off: that is all there is to see
        return found
    checked, checked_answers = check_round(engine)
    with unpatched() as own:
        merges = {"ours": patched(), "vllm": own}
        rounds, answers = in_turn(merges, lambda name: timed_round(engine, merges[name]))
        profiled = {provider: profiled_round(engine, merge) for provider, merge in merges.items()}
    with standing_in(merging_in_float64):
        exact = engine.answer()
    return found | {
        "checked": checked,
        "rounds": rounds,
        "profiled": profiled,
        "answers": {"ours": answers["ours"][0], "vllm": answers["vllm"][0], "float64": exact},
        "differences": all_differences(answers, exact, first, checked_answers),
        "fallbacks": plugin.status().fallbacks,
    }


def run_as_served(scenario: Scenario, model: str) -> dict[str, Any]:
    """Answers of an engine as `vllm serve` runs one, and the plugin's status in its worker."""
    engine = Engine(scenario, model, as_served=True)
    first = engine.answer()
    return {"title": scenario.title, "plugin": engine.plugin_in_worker(), "first": first}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("name", choices=SCENARIOS)
    parser.add_argument("model", help="the model's folder")
    parser.add_argument("--as-served", action="store_true", help="compiled, with processes")
    options = parser.parse_args()
    scenario = SCENARIOS[options.name]
    way, environment = run if scenario.ranks == 1 else across_ranks.run, WATCHED
    if options.as_served:
        way, environment = run_as_served, AS_SERVED
    os.environ.update(ENVIRONMENT | environment | scenario.environment)
    print(json.dumps(way(scenario, options.model)))


if __name__ == "__main__":
    main()
