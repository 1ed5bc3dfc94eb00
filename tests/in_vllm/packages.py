"""Fetches what the tests and the measurements with the real vLLM need, into .cache/vllm.

    python -m in_vllm.packages            # the Python packages of both releases
    python -m in_vllm.packages --engine   # what a whole engine needs

    .cache/vllm/0.33.0, 0.26.0   the wheel's Python files and metadata, its op library, and its
                                 FlashAttention 3
    .cache/vllm/needs            what those import, for this Python
    .cache/vllm/engine           the wheels that an engine on CPython 3.12 needs

Nothing of it is part of this project or of its packages. A release is 300 MB to download.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]  # not environment's: nothing here waits for PyTorch
FOLDER = ROOT / ".cache" / "vllm"
NEEDS = FOLDER / "needs"
RELEASES = ("0.33.0", "0.26.0")  # the newest, and the one for PyTorch 2.11
ENGINE = "0.26.0"
ENGINE_PYTHON = (3, 12)
OP_LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
FLASH_ATTENTION = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_31")


def run_pip(*arguments: str) -> bool:
    command = [sys.executable, "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
    return subprocess.run(command, check=False).returncode == 0


def pip(*arguments: str) -> None:
    if not run_pip(*arguments):
        raise SystemExit(
            "merge_attn_states: pip could not fetch that; without a network, copy .cache/vllm from "
            "a machine that has one."
        )


def fetch_release(version: str) -> None:
    target = FOLDER / version
    if target.is_dir():
        return
    with tempfile.TemporaryDirectory() as folder:
        pip("download", f"vllm=={version}", "--no-deps", "--dest", folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            unfinished = target.with_suffix(".unfinished")
            for name in archive.namelist():
                of_python = not name.endswith(".so") and "/deep_gemm/" not in name
                if of_python or name in (OP_LIBRARY, FLASH_ATTENTION):
                    archive.extract(name, unfinished)
        unfinished.rename(target)


def listed(name: str) -> list[str]:
    return Path(__file__).with_name(name).read_text().split()


def wheel_names(requirement: str, release: str = "*") -> str:
    """How the files of its wheels begin."""
    return f"{requirement.partition('==')[0].replace('-', '_').lower()}-{release}-*"


def is_installed(requirement: str) -> bool:
    try:
        importlib.metadata.distribution(requirement.partition("==")[0])
    except importlib.metadata.PackageNotFoundError:
        return False
    return True


def fetch_needs() -> None:
    """Install what the package and its attention backends import, without PyTorch.

    Where the engine's wheels lie and this is their Python, those: no network is asked.
    """
    target, made = NEEDS, NEEDS / "made_of"
    wheels = sorted(str(wheel) for wheel in (FOLDER / "engine").glob("*.whl"))
    here = wheels and sys.version_info[:2] == ENGINE_PYTHON
    wanted = ["--no-index", *wheels] if here else listed("needs.txt")
    of = "\n".join([sys.version, *wanted])
    if made.is_file() and made.read_text() == of:
        return
    unfinished = target.with_suffix(".unfinished")
    shutil.rmtree(unfinished, ignore_errors=True)
    pip("install", "--no-deps", "--target", str(unfinished), *wanted)
    (unfinished / made.name).write_text(of)
    shutil.rmtree(target, ignore_errors=True)  # only now: what serves another Python was not lost
    unfinished.rename(target)


def missing_wheels() -> list[str]:
    """What an engine needs and has no wheel for here."""
    folder = FOLDER / "engine"
    return [
        name
        for name in listed("engine_wheels.txt")
        if not any(folder.glob(wheel_names(name, name.partition("==")[2])))
    ]


def fetch_engine() -> None:
    """Fetch the wheels that an engine needs beside PyTorch, transformers and what they bring."""
    target = FOLDER / "engine"
    platforms = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    version = "".join(map(str, ENGINE_PYTHON))
    for name in missing_wheels():
        options = ["--no-deps", "--only-binary=:all:", f"--python-version={version}", *platforms]
        options += ["--platform=any", f"--abi=cp{version}", "--abi=abi3", "--abi=none"]
        pip("download", name, *options, "--dest", str(target))
    if sys.version_info[:2] != ENGINE_PYTHON:
        return
    # What most environments with PyTorch and transformers have, and this one has not.
    absent = [
        name
        for name in listed("needs.txt")
        if not any(target.glob(wheel_names(name))) and not is_installed(name)
    ]
    options = ["--no-deps", "--only-binary=:all:", "--retries=0", "--dest", str(target)]
    if absent and not run_pip("download", *options, *absent):
        print(f"not installed here, and not fetched: {', '.join(absent)}")  # perhaps not needed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", action="store_true", help="for a whole engine")
    engine = parser.parse_args().engine
    FOLDER.mkdir(parents=True, exist_ok=True)
    for version in [ENGINE] if engine else RELEASES:
        fetch_release(version)
    if engine:
        fetch_engine()
    fetch_needs()
    print(f"ready: {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
