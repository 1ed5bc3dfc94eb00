"""What engines' processes have seen, as records; whether it proves anything."""

from __future__ import annotations

import statistics
from typing import Any

from benchmarks.results import Record, Results
from benchmarks.timing import summary

from .records import rounded
from .rounds import differences
from .scenarios import LAYERS, SCENARIOS

SERVED_CASE = "compiled, in processes of its own: with the plugin, and without"


def proves_nothing(name: str, seen: dict[str, Any]) -> str:
    """Why an engine's run is none of the plugin's merges; empty where it is."""
    if not seen["plugin"]["active"]:
        return f"the plugin is not used: {seen['plugin']['reason']}"
    if seen["fallbacks"]:
        return f"calls went back to vLLM: {seen['fallbacks']}"
    scenario = SCENARIOS[name]
    if scenario.ranks > 1 and seen["plugin"]["across_ranks"]:
        return f"vLLM merges across ranks: {seen['plugin']['across_ranks']}"
    if scenario.graphs:
        least = LAYERS * (scenario.new_tokens - 1)  # a step's first tokens come of prefills
        more = seen["kernels"]["ours"] - seen["kernels"]["vllm"]
        return "" if more >= least else f"its graphs have {more} kernels of ours, not {least}"
    missing = set(scenario.merges) - {one["case"] for one in seen["checked"]}
    if missing or not all(gpu["merges"] for gpu in seen.get("profiled", {}).values()):
        return f"this engine did not merge as it should: {', '.join(missing) or 'not profiled'}"
    return ""


def records_of(name: str, seen: dict[str, Any]) -> list[Record]:
    """One engine's observations as records of its group."""
    records: list[Record] = [
        {"case": one["case"], "regime": f"error of {one['result']}", "provider": "ours"} | one
        for one in seen.get("checked", [])
    ]
    for provider, rounds in seen["rounds"].items():
        cases = {case for one in rounds for case in one["calls_us"]}
        for case in sorted(cases):
            us = [value for one in rounds for value in one["calls_us"].get(case, [])]
            records.append(
                {"case": case, "regime": "host", "provider": provider, "calls": len(us)}
                | rounded(summary(us))
            )
        steps = [sum(one["steps_us"]) for one in rounds]
        step_us = summary(steps)
        merges = [sum(map(sum, one["calls_us"].values())) for one in rounds]
        count = len(rounds[0]["steps_us"])
        share: Record = {
            "case": "all steps", "regime": "share", "provider": provider,
            "rounds": len(rounds), "steps": count,
            "step_us": round(step_us.median / count, 1),
            "step_low_us": round(step_us.low / count, 1),
            "step_high_us": round(step_us.high / count, 1),
        }  # fmt: skip
        if cases:
            shares = [merge / step for merge, step in zip(merges, steps, strict=True)]
            share["merges"] = sum(map(len, rounds[0]["calls_us"].values()))
            share["merge_share_of_wall"] = round(statistics.median(shares), 5)
        if gpu := seen.get("profiled", {}).get(provider):
            share["merges"] = gpu["merges"]
            share["merge_share_of_gpu"] = round(gpu["merge_us"] / gpu["all_us"], 5)
            share["gpu_us_a_merge"] = round(gpu["merge_us"] / max(1, gpu["merges"]), 3)
        records.append(share)
    records += [
        {"case": case, "regime": "answers", "provider": "ours"} | one
        for case, one in seen["differences"].items()
    ]
    return [{"group": name} | record for record in records]


def further_off(results: Results) -> list[str]:
    """Merges of which this package's result was further from float64 than vLLM's own."""
    return [
        f"  {record['group']}: {record['case']}, {record['result']}: {record['further_off']} of "
        f"{record['calls']} calls, by {record['largest_excess']:.1e} at most"
        for record in results.records
        if record.get("further_off")
    ]


def compare_taken_off(seen: dict[str, Any], off: dict[str, Any]) -> dict[str, Any]:
    """Add how an engine that was started without the plugin answers to what one with it saw."""
    if off["plugin"]["active"]:
        raise SystemExit("benchmarks: MERGE_ATTN_STATES_VLLM=0 did not take the plugin off")
    apart = differences(seen["answers"]["vllm"], off["first"])
    seen["differences"]["started without it, and taken off"] = apart
    return {"plugin": off["plugin"], "answers": off["first"]}


def compare_served(served: dict[str, Any], without: dict[str, Any]) -> tuple[Record, Record]:
    """What is told of engines as `vllm serve` runs them, and how their answers differ."""
    if not served["plugin"]["active"] or without["plugin"]["active"]:
        raise SystemExit(f"benchmarks: in the worker: {served['plugin']}, {without['plugin']}")
    if served["plugin"]["fallbacks"]:
        raise SystemExit(f"benchmarks: calls went back to vLLM: {served['plugin']['fallbacks']}")
    record = {"case": SERVED_CASE, "regime": "answers", "provider": "ours"}
    told = {"plugin": served["plugin"], "answers": [served["first"], without["first"]]}
    return told, record | differences(served["first"], without["first"])


def with_and_without(seen: dict[str, Any], off: dict[str, Any]) -> dict[str, Any]:
    """What two engines saw, whose CUDA graphs have the plugin's merge across ranks and vLLM's.

    Raises
    ------
    SystemExit
        It was not in one engine and out of the other.
    """
    if (*seen["rounds"], *off["rounds"]) != ("ours", "vllm"):
        reasons = [one["plugin"]["across_ranks"] for one in (seen, off)]
        raise SystemExit(f"benchmarks: with and without the plugin's merge: {reasons}")
    answers = seen["answers"] | off["answers"]
    return seen | {
        "rounds": seen["rounds"] | off["rounds"],
        "kernels": {"ours": seen["kernels"], "vllm": off["kernels"]},
        "answers": answers,
        "differences": {
            "with the plugin, and started without": differences(answers["ours"], answers["vllm"]),
            "with the plugin, twice": differences(answers["ours"], seen["last"]),
            "without it, twice": differences(answers["vllm"], off["last"]),
        },
    }
