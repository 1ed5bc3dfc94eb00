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
NO_SOURCES = ("*.so", "__pycache__", "*.egg-info")  # what a build leaves there
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


def tree_hash(folder: Path) -> str:
    """What git would call these files: `git rev-parse HEAD:folder` where they are the committed."""

    def digest(kind: str, content: bytes) -> bytes:
        return hashlib.sha1(f"{kind} {len(content)}\0".encode() + content).digest()

    nothing = digest("tree", b"")  # git keeps no empty folder
    entries = []
    for path in folder.iterdir():
        if any(path.match(pattern) for pattern in NO_SOURCES):
            continue
        name = path.name.encode()
        if path.is_dir():
            if (inner := bytes.fromhex(tree_hash(path))) != nothing:
                entries.append((name + b"/", b"40000", name, inner))
        else:
            entries.append((name, b"100644", name, digest("blob", path.read_bytes())))
    return digest("tree", b"".join(b"%s %s\0%s" % entry[1:] for entry in sorted(entries))).hex()


def source_trees(given: str | None) -> dict[str, Any]:
    """The commit and the hashes of the source trees measured, and whether they are that commit's.

    Raises
    ------
    SystemExit
        There is no git and not everything is handed in; or what is handed in are other sources.
    """
    trees = {tree: tree_hash(ROOT / tree) for tree in TREES}
    built_dirty = merge_attn_states.build_info()["commit"].endswith("-dirty")
    if given:
        pairs = dict(entry.partition("=")[::2] for entry in given.split(","))
        if set(pairs) != {*TREES, "commit"} or not all(pairs.values()):
            raise SystemExit(
                f"--source-trees: expected csrc=HASH,python=HASH,commit=HASH, got {given!r}"
            )
        for tree, here in trees.items():
            if pairs[tree] != here:
                raise SystemExit(f"--source-trees: {tree} is {here} here, not {pairs[tree]}")
        return {**pairs, "dirty": built_dirty}
    commit = git("rev-parse", "HEAD")
    if commit is None:
        raise SystemExit(
            "benchmarks: no git here, so the sources' hashes must be handed in: "
            "--source-trees csrc=HASH,python=HASH,commit=HASH "
            "(git rev-parse HEAD:csrc HEAD:python HEAD)"
        )
    changed = any(git("rev-parse", f"HEAD:{tree}") != here for tree, here in trees.items())
    return {**trees, "commit": commit, "dirty": changed or built_dirty}


def built_from_elsewhere(trees: dict[str, Any]) -> str:
    """Say whether the binary was built from another csrc than is recorded; empty if not known."""
    built = merge_attn_states.build_info()["commit"].removesuffix("-dirty")
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


def machine() -> dict[str, Any]:
    """What must agree too, and is told of each group."""
    return {"cpu": cpu_name(), "threads": torch.get_num_threads()}


def circumstances(device: torch.device, commit: str) -> dict[str, Any]:
    """What a group was measured under; it may differ between the groups of one file."""
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "commit": commit,
        "built_from": merge_attn_states.build_info()["commit"],
        **machine(),
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
