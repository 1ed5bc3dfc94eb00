"""The whole vLLM 0.26.0 with the plugin: `python -m benchmarks.in_vllm.engine --output FILE`.

Wants an H100 or newer with 30 GB to spare, CPython 3.12, PyTorch 2.11 with CUDA, and transformers.
What else it takes is fetched into .cache/vllm where there is a network (scripts/vllm_packages.py).
This package is installed there by pip, so that vLLM finds the plugin as a user's vLLM does. Each
scenario (scenarios.py) is a process of its own; one more is started with MERGE_ATTN_STATES_VLLM=0.
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
from pathlib import Path
from typing import Any

import torch

from .. import environment
from ..environment import ROOT
from ..measure import Record, rounded
from ..results import Results
from ..timing import Timing
from .process import differences
from .scenarios import ENVIRONMENT, SCENARIOS, save_model

FOLDER = ROOT / ".cache" / "vllm"
RELEASE = "0.26.0"
NEEDED = {  # beside the Python packages
    "vllm/_C_stable_libtorch.abi3.so": "its op library",
    "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so": "its FlashAttention 3",
    f"vllm-{RELEASE}.dist-info/METADATA": "its metadata",
}
DEVICE = torch.device("cuda")


def unfit() -> str:
    """Why this machine cannot run it; empty where it can."""
    if not torch.cuda.is_available():
        return "this PyTorch sees no GPU"
    if torch.cuda.get_device_capability()[0] < 9:
        return "FlashAttention 3, which is fetched alone, wants an H100 or newer"
    if not torch.__version__.startswith("2.11."):
        return f"vLLM {RELEASE} is built for PyTorch 2.11, and this is {torch.__version__}"
    if sys.version_info[:2] != (3, 12):
        return "the wheels that are fetched are CPython 3.12's"
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
    fetched = subprocess.run(
        [sys.executable, "scripts/vllm_packages.py", "--engine"], cwd=ROOT, check=False
    )
    absent = [f"  {RELEASE}/{path}: {what}" for path, what in NEEDED.items()
              if not (FOLDER / RELEASE / path).is_file()]  # fmt: skip
    if not (FOLDER / "needs" / "made_of").is_file():
        absent.append("  engine/*.whl, needs/: the wheels of scripts/vllm_engine_wheels.txt")
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


def run(name: str, model: Path, paths: list[Path], log: Path, **variables: str) -> dict[str, Any]:
    """Start one scenario's process and return what it saw."""
    scenario = SCENARIOS[name]
    variables |= ENVIRONMENT | scenario.environment
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks.in_vllm.process", name, str(model)],
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
            low, median, high = statistics.quantiles(us, n=4, method="inclusive")
            records.append(
                {"case": case, "regime": "host", "provider": provider, "calls": len(us)}
                | rounded(Timing(median, low, high))
            )
        steps = [sum(one["steps_us"]) for one in rounds]
        merges = [sum(map(sum, one["calls_us"].values())) for one in rounds]
        count = len(rounds[0]["steps_us"])
        shares = [merge / step for merge, step in zip(merges, steps, strict=True)]
        gpu = seen["profiled"][provider]
        records.append(
            {
                "case": "all steps", "regime": "share", "provider": provider,
                "rounds": len(rounds), "steps": count, "merges": gpu["merges"],
                "step_us": round(statistics.median(steps) / count, 1),
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
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON results")
    parser.add_argument("--source-trees", metavar="csrc=HASH,python=HASH,commit=HASH")
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, default=list(SCENARIOS))
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "vllm-engine")
    options = parser.parse_args(arguments)
    if why := unfit():
        raise SystemExit(f"benchmarks: {why}")
    fetch()
    options.logs.mkdir(parents=True, exist_ok=True)
    trees = environment.source_trees(options.source_trees)
    results = Results(environment.identity(DEVICE, trees, RELEASE, None))
    with tempfile.TemporaryDirectory() as folder:
        site = Path(folder, "site")
        install(site)
        paths = [site, FOLDER / RELEASE, FOLDER / "needs"]
        models = {SCENARIOS[name].model for name in options.only}
        for model in models:
            save_model(model, Path(folder, model))
        for name in options.only:
            model_folder = Path(folder, SCENARIOS[name].model)
            seen = run(name, model_folder, paths, options.logs / f"{name}.log")
            if why := proves_nothing(name, seen):
                raise SystemExit(f"benchmarks: {name}: {why}")
            run_ = environment.circumstances(DEVICE, trees["commit"])
            run_ |= {"title": seen["title"], "plugin": seen["plugin"], "log": seen["log"]}
            run_ |= {"fallbacks": seen["fallbacks"], "answers": seen["answers"]}
            results.add(name, results.environment, run_, records_of(name, seen))
            if options.output:
                results.save(options.output)
            for record in results.select(name):
                print(*(f"{key}={value}" for key, value in record.items()), sep="  ")
        name = options.only[0]
        off = run(name, Path(folder, SCENARIOS[name].model), paths, options.logs / "off.log",
                  MERGE_ATTN_STATES_VLLM="0")  # fmt: skip
        if off["plugin"]["active"]:
            raise SystemExit("benchmarks: MERGE_ATTN_STATES_VLLM=0 did not take the plugin off")
        results.runs[name]["off"] = {"plugin": off["plugin"], "answers": off["first"]}
        apart = differences(results.runs[name]["answers"]["vllm"], off["first"])
        record = {"group": name, "case": "started without it, and taken off", "regime": "answers"}
        records = [*results.select(name), record | {"provider": "vllm"} | apart]
        results.add(name, results.environment, results.runs[name], records)
    for record in results.records:
        if record.get("further_off"):
            print(f"FURTHER OFF THAN vLLM's own: {record}")
    if options.output:
        results.save(options.output)


if __name__ == "__main__":
    main(sys.argv[1:])
