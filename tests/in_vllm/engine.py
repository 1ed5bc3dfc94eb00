"""The whole vLLM 0.26.0 with the plugin: `python -m in_vllm.engine --output FILE`.

Wants an H100 or newer with 30 GB to spare, CPython 3.12, PyTorch 2.11 with CUDA, and transformers.
What else it takes is fetched into .cache/vllm where there is a network (packages.py).
This package is installed there by pip, so that vLLM finds the plugin as a user's vLLM does. Each
scenario (scenarios.py) is a process of its own; one more is started with MERGE_ATTN_STATES_VLLM=0,
and the first one twice as `vllm serve` runs an engine: compiled, in a process apart. Merges across
ranks want two GPUs; with CUDA graphs they take two engines, one with MERGE_ATTN_STATES_VLLM_DCP=0.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks import environment, options
from benchmarks.environment import ROOT
from benchmarks.results import Record, Results

from .observed import (
    compare_served,
    compare_taken_off,
    further_off,
    proves_nothing,
    records_of,
    with_and_without,
)
from .packages import ENGINE as RELEASE
from .packages import ENGINE_PYTHON, FLASH_ATTENTION, FOLDER, OP_LIBRARY, missing_wheels
from .scenarios import SCENARIOS, save_model

NEEDED = {  # beside the Python packages
    OP_LIBRARY: "its op library",
    FLASH_ATTENTION: "its FlashAttention 3",
    f"vllm-{RELEASE}.dist-info/METADATA": "its metadata",
}
DEVICE = torch.device("cuda")


def unfit(ranks: int = 1) -> str:
    """Why this machine cannot run it on so many GPUs; empty where it can."""
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
    if torch.cuda.device_count() < ranks:
        return f"it takes {ranks} GPUs"
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


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    options.add_results(parser)
    parser.add_argument("--only", nargs="+", choices=SCENARIOS, help="all that fit, if not given")
    parser.add_argument("--logs", type=Path, default=ROOT / "build" / "vllm-engine")
    chosen = parser.parse_args(arguments)
    names = fitting(chosen.only)
    fetch()
    chosen.logs.mkdir(parents=True, exist_ok=True)
    sources = environment.sources(chosen.commit)
    results = Results.open(chosen.output, environment.identity(DEVICE, sources, RELEASE))
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

        alone = [name for name in names if SCENARIOS[name].ranks == 1]
        for name in names:
            seen = start(name, name) if name in alone else start_ranks(start, name)
            if why := proves_nothing(name, seen):
                raise SystemExit(f"benchmarks: {name}: {why}")
            circumstances = environment.circumstances(DEVICE, sources["commit"])
            told = {key: seen[key] for key in ("title", "plugin", "log", "fallbacks", "answers")}
            if name in alone[:1]:
                off = start(name, "off", MERGE_ATTN_STATES_VLLM="0")
                told["off"] = compare_taken_off(seen, off)
            keep(name, circumstances | told, records_of(name, seen))

        for name in alone[:1]:
            served = start(name, "served", "--as-served")
            without = start(name, "served-off", "--as-served", MERGE_ATTN_STATES_VLLM="0")
            told, record = compare_served(served, without)
            extended = results.runs[name] | {"served": told}
            keep(name, extended, [{"group": name} | record], results.select(name))
    if said := further_off(results):
        raise SystemExit("\n".join(["benchmarks: further off than vLLM's own:", *said]))


def fitting(only: Sequence[str] | None) -> list[str]:
    """The scenarios that are started: those named, or all that this machine can run.

    Raises
    ------
    SystemExit
        It can run none of them, or not one that is named.
    """
    reasons = {name: unfit(SCENARIOS[name].ranks) for name in only or SCENARIOS}
    names = [name for name, why in reasons.items() if not why]
    refused = [f"{name}: {why}" for name, why in reasons.items() if why]
    if refused and (only or not names):
        raise SystemExit("\n".join(["benchmarks: this machine cannot run", *refused]))
    for one in refused:
        print(f"left out: {one}")
    return names


def start_ranks(start: Callable[..., dict[str, Any]], name: str) -> dict[str, Any]:
    """What was seen with and without the plugin's merge across ranks."""
    seen = start(name, name, MERGE_ATTN_STATES_VLLM_DCP="1")
    if not SCENARIOS[name].graphs:
        return seen
    return with_and_without(seen, start(name, f"{name}-off", MERGE_ATTN_STATES_VLLM_DCP="0"))


if __name__ == "__main__":
    main(sys.argv[1:])
