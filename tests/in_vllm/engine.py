"""The whole vLLM 0.26.0 with the plugin: `python -m in_vllm.engine --output FILE`.

Wants an H100 or newer with 30 GB to spare, CPython 3.12, PyTorch 2.11 with CUDA, and transformers.
What else it takes is fetched into .cache/vllm where there is a network (packages.py).
This package is installed there by pip, so that vLLM finds the plugin as a user's vLLM does. Each
scenario (scenarios.py) is a process of its own; one more is started with MERGE_ATTN_STATES_VLLM=0,
and the first one twice as `vllm serve` runs an engine: compiled, in a process apart.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, options
from benchmarks.environment import ROOT
from benchmarks.results import Record, Results
from benchmarks.timing import summary

from .packages import ENGINE as RELEASE
from .packages import ENGINE_PYTHON, FLASH_ATTENTION, FOLDER, OP_LIBRARY, missing_wheels
from .process import differences
from .records import rounded
from .scenarios import SCENARIOS, save_model

NEEDED = {  # beside the Python packages
    OP_LIBRARY: "its op library",
    FLASH_ATTENTION: "its FlashAttention 3",
    f"vllm-{RELEASE}.dist-info/METADATA": "its metadata",
}
DEVICE = torch.device("cuda")
SERVED_CASE = "compiled, in processes of its own: with the plugin, and without"


def unfit() -> str:
    """Why this machine cannot run it; empty where it can."""
    if not torch.cuda.is_available():
        return "this PyTorch sees no GPU"
    if torch.cuda.get_device_capability()[0] < 9:
        return "FlashAttention 3, which is fetched alone, wants an H100 or newer"
    if not torch.__version__.startswith("2.11."):
        return f"vLLM {RELEASE} is built for PyTorch 2.11, and this is {torch.__version__}"
    if sys.version_info[:2] != ENGINE_PYTHON:
        return f"the wheels that are fetched are CPython {'.'.join(map(str, ENGINE_PYTHON))}'s"
    if importlib.util.find_spec("transformers") is None:
        return "transformers is missing: it makes the models"
    return ""


def fetch() -> None:
    """Fetch what is missing; where that fails, say what is.

    Raises
    ------
    SystemExit
        Something is missing and cannot be fetched.
    """
    command = [sys.executable, "-m", "in_vllm.packages", "--engine"]
    fetched = subprocess.run(command, cwd=ROOT, check=False)
    absent = [f"  {RELEASE}/{path}: {what}" for path, what in NEEDED.items()
              if not (FOLDER / RELEASE / path).is_file()]  # fmt: skip
    absent += [f"  engine/: a wheel of {name}" for name in missing_wheels()]
    if not (FOLDER / "needs" / "made_of").is_file():
        absent.append("  needs/: what those wheels install")
    if absent:
        raise SystemExit("\n".join(["benchmarks: .cache/vllm lacks, of vLLM:", *absent]))
    if fetched.returncode:
        raise SystemExit(fetched.returncode)


def install(target: Path) -> None:
    """Install this checkout by pip; MERGE_ATTN_STATES_OP_LIBRARY names an op library to take."""
    command = [sys.executable, "-m", "pip", "install", "-q", "--no-build-isolation", "--no-deps"]
    ran = subprocess.run(
        [*command, "--no-index", "--upgrade", "--target", str(target), "."], cwd=ROOT, check=False
    )
    if ran.returncode:
        raise SystemExit("benchmarks: pip could not install this checkout")


def run(
    name: str, model: Path, paths: list[Path], log: Path, *options: str, **variables: str
) -> dict[str, Any]:
    """Start one scenario's process and return what it saw."""
    ran = subprocess.run(
        [sys.executable, "-m", "in_vllm.process", name, str(model), *options],
        cwd=ROOT,
        env=os.environ | variables | {"PYTHONPATH": os.pathsep.join(map(str, paths))},
        capture_output=True,
        text=True,
        check=False,
    )
    log.write_text(ran.stdout + ran.stderr, encoding="utf-8")
    if ran.returncode:
        last = "\n".join(ran.stderr.splitlines()[-30:])
        raise SystemExit(f"benchmarks: the engine failed ({log}):\n{last}")
    lines = [line for line in ran.stdout.splitlines() if line.startswith("{")]
    seen: dict[str, Any] = json.loads(lines[-1])
    seen["log"] = next(
        (line for line in (ran.stdout + ran.stderr).splitlines() if ": replaced " in line), ""
    )
    return seen


def proves_nothing(name: str, seen: dict[str, Any]) -> str:
    """Why an engine's run is none of the plugin's merges; empty where it is."""
    if not seen["plugin"]["active"]:
        return f"the plugin is not used: {seen['plugin']['reason']}"
    if seen["fallbacks"]:
        return f"calls went back to vLLM: {seen['fallbacks']}"
    missing = set(SCENARIOS[name].merges) - {one["case"] for one in seen["checked"]}
    if missing or not all(gpu["merges"] for gpu in seen["profiled"].values()):
        return f"this engine did not merge as it should: {', '.join(missing) or 'not profiled'}"
    return ""


def records_of(name: str, seen: dict[str, Any]) -> list[Record]:
    """One engine's observations as records of its group."""
    records: list[Record] = [
        {"case": one["case"], "regime": f"error of {one['result']}", "provider": "ours"} | one
        for one in seen["checked"]
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
        shares = [merge / step for merge, step in zip(merges, steps, strict=True)]
        gpu = seen["profiled"][provider]
        records.append(
            {
                "case": "all steps", "regime": "share", "provider": provider,
                "rounds": len(rounds), "steps": count, "merges": gpu["merges"],
                "step_us": round(step_us.median / count, 1),
                "step_low_us": round(step_us.low / count, 1),
                "step_high_us": round(step_us.high / count, 1),
                "merge_share_of_wall": round(statistics.median(shares), 5),
                "merge_share_of_gpu": round(gpu["merge_us"] / gpu["all_us"], 5),
                "gpu_us_a_merge": round(gpu["merge_us"] / max(1, gpu["merges"]), 3),
            }
        )  # fmt: skip
    records += [
        {"case": case, "regime": "answers", "provider": "ours"} | one
        for case, one in seen["differences"].items()
    ]
    return [{"group": name} | record for record in records]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_results(parser)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "vllm-engine")
    chosen = parser.parse_args(arguments)
    if why := unfit():
        raise SystemExit(f"benchmarks: {why}")
    fetch()
    chosen.logs.mkdir(parents=True, exist_ok=True)
    sources = environment.sources(chosen.commit)
    results = Results(environment.identity(DEVICE, sources, RELEASE))
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        install(site)
        paths = [site, FOLDER / RELEASE, FOLDER / "needs", ROOT / "tests"]

        def start(name: str, log: str, *given: str, **variables: str) -> dict[str, Any]:
            model = Path(folder, SCENARIOS[name].model)
            if not model.exists():
                save_model(model.name, model)
            return run(name, model, paths, chosen.logs / f"{log}.log", *given, **variables)

        def keep(name: str, run: Record, new: list[Record], old: Sequence[Record] = ()) -> None:
            results.add(name, run, [*old, *new])
            if chosen.output:
                results.save(chosen.output)
            for record in new:
                print(*(f"{key}={value}" for key, value in record.items()), sep="  ")

        for name in chosen.only:
            seen = start(name, name)
            if why := proves_nothing(name, seen):
                raise SystemExit(f"benchmarks: {name}: {why}")
            circumstances = environment.circumstances(DEVICE, sources["commit"])
            told = {key: seen[key] for key in ("title", "plugin", "log", "fallbacks", "answers")}
            if name == chosen.only[0]:
                off = start(name, "off", MERGE_ATTN_STATES_VLLM="0")
                told["off"] = compare_taken_off(seen, off)
            keep(name, circumstances | told, records_of(name, seen))

        first = chosen.only[0]
        served = start(first, "served", "--as-served")
        without = start(first, "served-off", "--as-served", MERGE_ATTN_STATES_VLLM="0")
        told, record = compare_served(served, without)
        seen_before = results.select(first)
        keep(
            first, results.runs[first] | {"served": told}, [{"group": first} | record], seen_before
        )
    if said := further_off(results):
        raise SystemExit("\n".join(["benchmarks: further off than vLLM's own:", *said]))


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


if __name__ == "__main__":
    main(sys.argv[1:])
