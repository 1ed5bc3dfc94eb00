"""Finds the CUDA toolkit to build with and chooses the architectures; setup.py imports it.

Says what it found, and refuses in one sentence. It knows nothing of PyTorch.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from pathlib import Path
from typing import NamedTuple, NoReturn

DEFAULT_TOOLKIT = Path("/usr/local/cuda")
DEFAULT_ARCHITECTURES = ("8.0", "8.6", "8.9", "9.0", "10.0+PTX", "12.0")


def note(sentence: str) -> None:
    print(f"merge_attn_states: {sentence}", flush=True)


def refuse(sentence: str) -> NoReturn:
    raise SystemExit(f"merge_attn_states: {sentence}")


class Toolkit(NamedTuple):
    home: Path
    version: str
    architectures: list[str]

    def gencodes(self) -> list[str]:
        flags = []
        for architecture in self.architectures:
            number, _, ptx = architecture.replace(".", "").partition("+")
            flags.append(f"-gencode=arch=compute_{number},code=sm_{number}")
            if ptx:
                flags.append(f"-gencode=arch=compute_{number},code=compute_{number}")
        return flags


def nvcc_output(nvcc: Path | str, *arguments: str) -> str:
    ran = subprocess.run([str(nvcc), *arguments], capture_output=True, text=True, check=False)
    return ran.stdout + ran.stderr


def find_toolkit() -> tuple[Path | None, str]:
    """The CUDA toolkit's folder, or None and why."""
    if os.environ.get("CUDA_HOME"):
        home = Path(os.environ["CUDA_HOME"])
        if (home / "bin/nvcc").is_file():
            return home, ""
        return None, f"CUDA_HOME={home} has no bin/nvcc"
    if (DEFAULT_TOOLKIT / "bin/nvcc").is_file():
        return DEFAULT_TOOLKIT, ""
    # An nvcc on PATH may be a wrapper outside the toolkit, so it is asked where the toolkit lies.
    if nvcc := shutil.which("nvcc"):
        dry_run = nvcc_output(nvcc, "--dryrun", "-x", "cu", "-c", os.devnull, "-o", os.devnull)
        if top := re.search(r"^#\$ TOP=(.+)$", dry_run, re.MULTILINE):
            return Path(top[1].strip()).resolve(), ""
    return None, f"CUDA_HOME is not set, and neither {DEFAULT_TOOLKIT} nor PATH has nvcc"


def choose_architectures(nvcc: Path) -> list[str]:
    known = set(re.findall(r"compute_(\d+)", nvcc_output(nvcc, "--list-gpu-arch")))
    requested = os.environ.get("TORCH_CUDA_ARCH_LIST", "").replace(";", " ").split()
    for entry in requested:
        if not re.fullmatch(r"\d+\.\d[af]?(\+PTX)?", entry):
            refuse(f"TORCH_CUDA_ARCH_LIST: expected entries like 9.0 or 10.0+PTX, got {entry!r}.")
        if re.sub(r"\D", "", entry) not in known:
            refuse(f"TORCH_CUDA_ARCH_LIST: {nvcc} cannot compile for {entry}.")
    if requested:
        return requested
    chosen = [entry for entry in DEFAULT_ARCHITECTURES if re.sub(r"\D", "", entry) in known]
    if chosen and not any(entry.endswith("+PTX") for entry in chosen):
        chosen[-1] += "+PTX"  # an older nvcc: newer GPUs still get something to run
    return chosen


def choose_toolkit(not_wanted: str) -> Toolkit | None:
    """The toolkit to build with, or None for a CPU build.

    `not_wanted`, where it is not empty, is the reason why this has to be a CPU build.
    """
    wanted = os.environ.get("MERGE_ATTN_STATES_CUDA") or "auto"
    if wanted not in ("auto", "1", "0"):
        refuse(f"MERGE_ATTN_STATES_CUDA: expected auto, 1 or 0, got {wanted!r}.")
    if wanted == "0":
        home, why = None, "MERGE_ATTN_STATES_CUDA=0"
    elif not_wanted:
        home, why = None, not_wanted
    else:
        home, why = find_toolkit()
    if home is None and wanted == "1":
        refuse(f"MERGE_ATTN_STATES_CUDA=1 asks for the CUDA kernels, but {why}.")
    if home is None:
        note(f"no CUDA kernels in this build, CPU only: {why}")
        return None
    nvcc = home / "bin/nvcc"
    release = re.search(r"release (\d+\.\d+)", nvcc_output(nvcc, "--version"))
    if not release:
        refuse(f"{nvcc} --version gives no release: is it a CUDA compiler?")
    toolkit = Toolkit(home, release[1], choose_architectures(nvcc))
    note(f"CUDA {toolkit.version} at {home}, kernels for {' '.join(toolkit.architectures)}")
    return toolkit
