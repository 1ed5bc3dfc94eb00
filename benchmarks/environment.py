"""Where and of what a result is: GPU, clocks, driver, versions, the hashes of the sources."""

import datetime
import hashlib
import platform
import subprocess
from functools import partial
from pathlib import Path
from typing import Any

import torch

import merge_attn_states

from . import vllm

ROOT = Path(__file__).resolve().parents[1]
TREES = ("csrc", "include", "python")
NO_SOURCES = ("*.so", "__pycache__", "*.egg-info")  # what a build leaves there


def _answer(*command: str) -> str:
    """What a program says; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""


git = partial(_answer, "git", "-C", str(ROOT))  # nothing, too, where this is no checkout


def tree_hash(folder: Path) -> str:
    """What git would call these files: `git rev-parse HEAD:folder` where they are the committed."""

    def digest(kind: str, content: bytes) -> bytes:
        return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()

    nothing = digest("tree", b"")  # git keeps no empty folder
    entries = []
    for path in folder.glob("*"):  # none where the folder is none
        if any(path.match(pattern) for pattern in NO_SOURCES):
            continue
        name = path.name.encode()
        if path.is_dir():
            if (inner := bytes.fromhex(tree_hash(path))) != nothing:
                entries.append((name + b"/", b"40000", name, inner))
        else:
            entries.append((name, b"100644", name, digest("blob", path.read_bytes())))
    return digest("tree", b"".join(b"%s %s\0%s" % entry[1:] for entry in sorted(entries))).hex()


def sources(commit: str | None = None) -> dict[str, Any]:
    """The hashes of the source trees that are measured, their commit, and whether they are dirty.

    Dirty: they are not that commit's, or were not when the binary was built, or the binary is of
    another commit's C++. Without git only the binary can tell, and `commit` must be handed in.
    """
    trees = {tree: tree_hash(ROOT / tree) for tree in TREES}
    head = git("rev-parse", "HEAD") or commit
    if not head:
        raise SystemExit("benchmarks: no git here: say of which commit this is by --commit HASH")
    built = merge_attn_states.build_info()["commit"]
    dirty = built.endswith("-dirty")
    for tree, here in trees.items():
        for of in (head, built)[: 1 + (tree != "python")]:
            dirty |= git("rev-parse", "--verify", "--quiet", f"{of}:{tree}") not in ("", here)
    return {"trees": trees, "commit": head, "dirty": dirty}


def stale(environment: dict[str, Any]) -> list[str]:
    """The source trees that are others here than were measured."""
    return [tree for tree, was in environment["trees"].items() if tree_hash(ROOT / tree) != was]


def identity(
    device: torch.device, sources: dict[str, Any], vllm_version: str | None = None
) -> dict[str, Any]:
    """What must agree for results to stand in one file. None: not known, or not there."""
    build, cuda = merge_attn_states.build_info(), device.type == "cuda"
    return {
        "gpu": torch.cuda.get_device_name(device) if cuda else None,
        "driver": nvidia_smi("driver_version").get("driver_version") if cuda else None,
        "cpu": cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "cuda": {"torch": torch.version.cuda, "build": build["cuda"]},
        "compiler": build["compiler"],
        "vllm": (vllm_version or vllm.version()) if cuda else None,
        "flashinfer": vllm.version("flashinfer-python") if cuda else None,
        "python": platform.python_version(),
        "trees": sources["trees"],
        "dirty": sources["dirty"],
    }


def circumstances(device: torch.device, commit: str) -> dict[str, Any]:
    """What a group was measured under; it may differ between the groups of one file."""
    date = datetime.datetime.now(datetime.timezone.utc).date().isoformat()
    clocks = clocks_under_load(device) if device.type == "cuda" else {}
    return {"date": date, "commit": commit, "clocks": clocks}


def cpu_name() -> str:
    lines = _answer("cat", "/proc/cpuinfo").splitlines()
    names = (line.partition(": ")[2] for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def nvidia_smi(*fields: str) -> dict[str, str]:
    """Its answers for the current device; nothing where it cannot be asked."""
    query = f"--query-gpu={','.join(fields)}"
    uuid = torch.cuda.get_device_properties(torch.cuda.current_device()).uuid
    ask = partial(_answer, "nvidia-smi", query, "--format=csv,noheader")
    said = (ask(f"--id=GPU-{uuid}") or ask()).partition("\n")[0]
    return dict(zip(fields, said.split(", "), strict=True)) if said else {}


def clocks_under_load(device: torch.device) -> dict[str, str]:
    """The clocks while the GPU copies, as it does when it is measured."""
    source = torch.empty(2**30, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    for _ in range(900):  # half a second or more, all of it queued; nvidia-smi answers within it
        target.copy_(source)
    answers = nvidia_smi("clocks.sm", "clocks.mem", "power.limit")
    torch.cuda.synchronize()
    return answers
