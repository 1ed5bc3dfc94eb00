"""Compiles this folder's CUDA files by nvcc, once each, and loads them through ctypes."""

from __future__ import annotations

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from pathlib import Path

HERE = Path(__file__).parent
BUILT = HERE.parent / "build" / "benchmarks"


@functools.cache
def library(name: str) -> ctypes.CDLL:
    """`<name>.cu` of this folder for this machine's GPU."""
    source = HERE / f"{name}.cu"
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    flags = ["-O3", "-std=c++17", "-arch=native", "-Xcompiler", "-fPIC", "-shared"]
    digest = hashlib.sha256(source.read_bytes() + repr(flags).encode()).hexdigest()[:16]
    target = BUILT / f"{name}-{digest}.so"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([nvcc, *flags, "-o", str(unfinished), str(source)], check=True)
        unfinished.replace(target)
    return ctypes.CDLL(str(target))
