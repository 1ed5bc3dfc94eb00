"""Fetches what the tests and the measurements with the real vLLM need, into .cache/vllm.

    python scripts/vllm_packages.py            # the Python packages of both releases
    python scripts/vllm_packages.py --engine   # what a whole engine needs, for CPython 3.12 too

    .cache/vllm/0.33.0, 0.26.0   the wheel's Python files, metadata and the compiled merge
    .cache/vllm/needs            what those import, for this Python
    .cache/vllm/engine           0.26.0's FlashAttention 3, and wheels for an engine on CPython 3.12

Nothing of it is part of this project or of its packages. A release is 300 MB to download.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / ".cache" / "vllm"
RELEASES = ("0.33.0", "0.26.0")  # the newest, and the one for PyTorch 2.11
ENGINE = "0.26.0"
OP_LIBRARY = "vllm/_C_stable_libtorch.abi3.so"
FLASH_ATTENTION = "vllm/vllm_flash_attn/_vllm_fa3_C.abi3.so"
# What the package and its attention backends import, without PyTorch.
NEEDS = """
    aiohappyeyeballs aiohttp aiosignal annotated-doc annotated-types anyio apache-tvm-ffi attrs
    cachetools cbor2 certifi charset-normalizer click cloudpickle einops fastapi filelock frozenlist
    fsspec h11 hf-xet httpcore2 httpx2 huggingface-hub idna llguidance markdown-it-py mdurl msgspec
    multidict numpy openai openai-harmony opentelemetry-api packaging partial-json-parser
    prometheus-client propcache psutil py-cpuinfo pybase64 pydantic pydantic-core pygments pyyaml
    pyzmq regex requests rich safetensors shellingham sniffio starlette tokenizers tqdm transformers
    truststore typer typing-extensions typing-inspection urllib3 uvloop xgrammar yarl
""".split()  # noqa: SIM905
PLATFORMS = ("manylinux_2_28", "manylinux_2_17", "manylinux2014", "manylinux_2_31")


def pip(*arguments: str) -> None:
    command = [sys.executable, "-m", "pip", *arguments, "-q", "--disable-pip-version-check"]
    if subprocess.run(command, check=False).returncode:
        raise SystemExit(
            "merge_attn_states: pip could not fetch that; without a network, copy .cache/vllm from "
            "a machine that has one."
        )


def fetch_release(version: str) -> None:
    target = FOLDER / version
    if (target / OP_LIBRARY).is_file():
        return
    with tempfile.TemporaryDirectory() as folder:
        pip("download", f"vllm=={version}", "--no-deps", "--dest", folder)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            for name in archive.namelist():
                of_python = not name.endswith(".so") and "/deep_gemm/" not in name
                if of_python or name in (OP_LIBRARY, FLASH_ATTENTION):
                    archive.extract(name, target)


def fetch_needs() -> None:
    target = FOLDER / "needs"
    if not (target / "complete").is_file():
        pip("install", "--no-deps", "--upgrade", "--target", str(target), *NEEDS)
        (target / "complete").touch()


def fetch_engine() -> None:
    """The wheels that an engine needs beside PyTorch, transformers and what they bring."""
    target = FOLDER / "engine"
    platforms = [f"--platform={platform}_x86_64" for platform in PLATFORMS]
    names = (ROOT / "scripts" / "vllm_engine_wheels.txt").read_text().split()
    for name in names:
        project = name.partition("==")[0]
        if any(target.glob(f"{project.replace('-', '_')}-*")):
            continue
        options = ["--no-deps", "--only-binary=:all:", "--python-version=312", *platforms]
        options += ["--platform=any", "--abi=cp312", "--abi=abi3", "--abi=none"]
        pip("download", name, *options, "--dest", str(target))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--engine", action="store_true", help="for a whole engine")
    engine = parser.parse_args().engine
    FOLDER.mkdir(parents=True, exist_ok=True)
    for version in [ENGINE] if engine else RELEASES:
        fetch_release(version)
    if engine:
        fetch_engine()
    else:
        fetch_needs()
    print(f"ready: {FOLDER.relative_to(ROOT)}")


if __name__ == "__main__":
    main()
