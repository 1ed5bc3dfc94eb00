"""Fetches the packages whose own merges the tests call, into .cache/adopters.

    python -m adopters.packages

    .cache/adopters/NAME         what the tests need of each archive, 31 MB of 110 in all
    .cache/adopters/needs-3.x    what diffusers imports, for this Python

Nothing of it is part of this project or of its packages.
"""

from __future__ import annotations

import hashlib
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path
from typing import NamedTuple

from in_vllm.packages import ROOT, run_pip

FOLDER = ROOT / ".cache" / "adopters"
NEEDS = FOLDER / "needs-{}.{}".format(*sys.version_info[:2])
OF_DIFFUSERS = (
    *("certifi==2026.10.19.post1", "charset-normalizer==3.5.3", "idna==3.20"),
    *("pillow==13.0.0", "requests==2.34.2", "urllib3==2.8.0"),
)
# One archive for every Python: only files of Python are taken out of it.
WHEEL = ("--only-binary=:all:", "--python-version=3.11", "--platform=manylinux_2_34_x86_64")
SDIST = ("--no-binary=:all:", "--no-build-isolation")  # isolated, pip would fetch a PyTorch for it


class Package(NamedTuple):
    requirement: str
    sha256: str
    kept: tuple[str, ...]  # how the names of the files begin that are kept
    root: str = ""  # where they are imported from
    kind: tuple[str, ...] = WHEEL


PACKAGES = {
    "diffusers": Package(
        "diffusers==0.42.1",
        "9154faa704ce00e0b77f568e0d64786064368528aab5fc14eeea92f87d788014",
        ("diffusers",),
    ),
    "flashinfer": Package(
        "flashinfer-python==0.7.2.post1",
        "bfdc18b9e1e4d8d0730fe4343dc0e284cd0c160086de80f99888bc4867922d49",
        ("flashinfer/cascade.py", "flashinfer/triton/kernels/cascade.py"),
    ),
    "natten": Package(
        "natten==0.21.7",
        "8417236b74db079b2d23899ec8f77514fb2dc73d4bbd6b346a45b6967fc05ffb",
        ("natten-0.21.7/src/natten/",),
        "natten-0.21.7/src",
        SDIST,
    ),
    "ring_flash_attn": Package(
        "ring-flash-attn==0.1.8",
        "296c929516c3b21f7bcdaeca44a99bb541779a7b63979eb0f67837dcb18a2bb9",
        ("ring_flash_attn/utils.py",),
    ),
    "sglang": Package(
        "sglang==0.5.23",
        "00b3cd5b265ac76c64185fbb6b95424f324ddd9f428d0306b77bc9db9d859937",
        ("sglang/kernels/ops/attention/merge_state.py",),
    ),
    "yunchang": Package(
        "yunchang==0.6.4",
        "cce4295058e9de2c0592d69cfe1e3e679711def5f315fd1b68dbed2d54bc9255",
        ("yunchang/",),
    ),
}


def root_of(name: str) -> Path:
    """The folder from which the package is imported, once it is fetched."""
    return FOLDER / name / PACKAGES[name].root


def pip(*arguments: str) -> None:
    if not run_pip(*arguments):
        raise SystemExit(
            "merge_attn_states: pip could not fetch that; without a network, copy .cache/adopters "
            "from a machine that has one."
        )


def fetch(name: str) -> None:
    package, target = PACKAGES[name], FOLDER / name
    if target.is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        pip("download", package.requirement, "--no-deps", *package.kind, "--dest", folder)
        (archive,) = Path(folder).iterdir()
        found = hashlib.sha256(archive.read_bytes()).hexdigest()
        if found != package.sha256:
            raise SystemExit(f"merge_attn_states: {archive.name} has another sha256: {found}")
        unfinished = target.with_suffix(".unfinished")
        extract(archive, package.kept, unfinished)
        unfinished.rename(target)


def extract(archive: Path, kept: tuple[str, ...], target: Path) -> None:
    if archive.suffix == ".whl":
        with zipfile.ZipFile(archive) as wheel:
            names = [name for name in wheel.namelist() if name.startswith(kept)]
            wheel.extractall(target, names)
    else:
        with tarfile.open(archive) as sdist:
            members = [member for member in sdist.getmembers() if member.name.startswith(kept)]
            sdist.extractall(target, members, filter="data")


def fetch_needs() -> None:
    if NEEDS.is_dir():
        return
    unfinished = NEEDS.with_name(NEEDS.name + ".unfinished")
    pip("install", "--no-deps", "--target", str(unfinished), *OF_DIFFUSERS)
    unfinished.rename(NEEDS)


def main() -> None:
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name in PACKAGES:
        fetch(name)
    fetch_needs()
    print(f"ready: {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
