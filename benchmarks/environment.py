"""Where and of what a result is: GPU, clocks, driver, versions, the hashes of the sources."""

from __future__ import annotations

import datetime
import hashlib
import platform
import subprocess
from pathlib import Path
from typing import Any

import torch

import merge_attn_states

from . import vllm
from .providers import flashinfer_version

ROOT = Path(__file__).resolve().parents[1]
TREES = ("csrc", "python")
CLOCKS = ("clocks.sm", "clocks.max.sm", "clocks.mem", "clocks.max.mem", "power.limit")


def git(*arguments: str) -> str | None:
    """What git says of this checkout; None where there is no git or no checkout."""
    try:
        ran = subprocess.run(
            ["git", "-C", str(ROOT), *arguments], capture_output=True, text=True, check=True
        )
    except (OSError, subprocess.CalledProcessError):
        return None
    return ran.stdout.strip()


def source_trees(given: str | None) -> dict[str, Any]:
    """The commit and the hashes of the source trees measured, from git or as handed in.

    Raises
    ------
    SystemExit
        There is no git and not everything is handed in.
    """
    if given:
        pairs = dict(entry.partition("=")[::2] for entry in given.split(","))
        if set(pairs) - {"dirty"} != {*TREES, "commit"}:
            raise SystemExit(
                f"--source-trees: expected csrc=HASH,python=HASH,commit=HASH, got {given!r}"
            )
        return {**pairs, "dirty": bool(pairs.get("dirty"))}
    commit = git("rev-parse", "HEAD")
    if commit is None:
        raise SystemExit(
            "benchmarks: no git here, so the sources' hashes must be handed in: "
            "--source-trees csrc=HASH,python=HASH,commit=HASH "
            "(git rev-parse HEAD:csrc HEAD:python HEAD)"
        )
    trees = {tree: git("rev-parse", f"HEAD:{tree}") for tree in TREES}
    return {**trees, "commit": commit, "dirty": bool(git("status", "--porcelain", "--", *TREES))}


def built_from_elsewhere(trees: dict[str, Any]) -> str:
    """Say whether the binary was built from another csrc than is recorded; empty if not known."""
    built = merge_attn_states.build_info()["commit"]
    tree = git("rev-parse", f"{built}:csrc")
    if tree is None or tree == trees["csrc"]:
        return ""
    return f"the op library was built from commit {built}, whose csrc is another: build again"


def identity(
    device: torch.device, trees: dict[str, Any], vllm_version: str | None, op_library: str | None
) -> dict[str, Any]:
    """What must agree for results to stand in one file. None: not known, or not there."""
    cuda = device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": nvidia_smi("driver_version").get("driver_version") if cuda else None,
        "torch": torch.__version__,
        "torch_cuda": torch.version.cuda,
        "build_cuda": merge_attn_states.build_info()["cuda"],
        "compiler": merge_attn_states.build_info()["compiler"],
        "vllm": (vllm_version or vllm.version()) if cuda else None,
        "vllm_op_library": file_digest(op_library) if cuda and op_library else None,
        "flashinfer": flashinfer_version()[0] if cuda else None,
        "python": platform.python_version(),
        "trees": {tree: trees[tree] for tree in TREES},
        "dirty": trees["dirty"],
    }


def circumstances(device: torch.device, commit: str) -> dict[str, Any]:
    """What a group was measured under; it may differ between the groups of one file."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "clocks": clocks_under_load(device) if device.type == "cuda" else {},
    }


def file_digest(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Its answers for the current device; nothing where it cannot be asked."""
    query = [f"--query-gpu={','.join(fields)}", "--format=csv,noheader"]
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    uuid = getattr(properties, "uuid", None)
    for select in ([f"--id=GPU-{uuid}"], []):
        try:
            ran = subprocess.run(
                ["nvidia-smi", *select, *query], capture_output=True, text=True, check=True
            )
        except (OSError, subprocess.CalledProcessError):
            continue
        answers = ran.stdout.splitlines()[0].split(", ")
        return dict(zip(fields, answers, strict=True))
    return {}


def clocks_under_load(device: torch.device) -> dict[str, str]:
    """The clocks while the GPU copies, as it does when it is measured."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(900):  # half a second or more, all of it queued; nvidia-smi answers within it
        target.copy_(source)
    answers = nvidia_smi(*CLOCKS)
    torch.cuda.synchronize()
    return answers
