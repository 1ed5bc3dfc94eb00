"""The kernels of kernels.cu, compiled once by nvcc and launched on the current stream."""

import ctypes
import functools
import hashlib
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

import torch

PACK = 16  # bytes that a thread reads of each input
SOURCE = 4096  # packs, and LSEs, that the producer repeats
SOURCE_FILE = Path(__file__).with_name("kernels.cu")
BUILT = SOURCE_FILE.parents[1] / "build" / "benchmarks"
Tensors = Sequence[torch.Tensor]  # each dense

Variant = tuple[int, int, bool]  # threads, packs a thread, launched dependent on the one before

# The plain kernels, whose best is the limit, by name.
BETWEEN_NEIGHBOURS: dict[str, Variant] = {f"{t} threads": (t, 1, False) for t in (128, 256, 512)}
COLD = BETWEEN_NEIGHBOURS | {"1024 threads": (1024, 1, False)}
COLD_MANY = COLD | {f"{name}, dependent": (*how[:2], True) for name, how in COLD.items()}
COLD |= {f"{t} threads, two packs each": (t, 2, False) for t in (256, 512)}
COLD |= {f"{name}, dependent": (*how[:2], True) for name, how in COLD.items()}


@functools.cache
def library() -> ctypes.CDLL:
    """kernels.cu for this machine's GPU."""
    nvcc = shutil.which("nvcc") or "/usr/local/cuda/bin/nvcc"
    architecture = "sm_{}{}".format(*torch.cuda.get_device_capability())
    flags = ["-O3", "-std=c++17", f"-arch={architecture}", "-Xcompiler", "-fPIC", "-shared"]
    digest = hashlib.sha256(SOURCE_FILE.read_bytes() + repr(flags).encode()).hexdigest()[:16]
    target = BUILT / f"kernels-{digest}.so"
    if not target.exists():
        BUILT.mkdir(parents=True, exist_ok=True)
        unfinished = target.with_suffix(f".{os.getpid()}")
        subprocess.run([nvcc, *flags, "-o", str(unfinished), str(SOURCE_FILE)], check=True)
        unfinished.replace(target)
    return ctypes.CDLL(str(target))


def _launch(name: str, *arguments: int | torch.Tensor) -> None:
    function = getattr(library(), f"launch_{name}")
    stream = torch.cuda.current_stream().cuda_stream
    given = [one.data_ptr() if isinstance(one, torch.Tensor) else one for one in arguments]
    if error := function(*map(ctypes.c_int64, [*given, stream])):
        raise RuntimeError(f"{name}: CUDA error {error}")


def produce(parts: Tensors, lses: Tensors, sources: Tensors) -> None:
    """Write both parts and both LSEs, out of small sources: of the parts, of each LSE."""
    packs = min(part.nbytes for part in parts) // PACK
    _launch("produce", *parts, *lses, *sources, packs, min(lse.nbytes for lse in lses) // 4)


def consume(output: torch.Tensor, sink: torch.Tensor) -> None:
    """Read the output; `sink` has room for a pack."""
    _launch("consume", output, sink, output.nbytes // PACK)


def nothing(packs: int) -> None:
    """Run as many blocks as a neighbour over so many packs has, which do nothing."""
    _launch("nothing", packs)


def plain(variant: Variant, buffers: Tensors, packs: int, is_narrow: bool) -> None:
    """Read so many packs of two buffers and write as many bytes to the third, or half as many."""
    _launch("plain", *buffers, packs, is_narrow, *variant)


def plain_many(variant: Variant, parts: torch.Tensor, output: torch.Tensor) -> None:
    """Read the 2, 4, 8 or 16 parts of a stack and write one."""
    _launch("plain_many", parts, output, output.nbytes // PACK, len(parts), *variant)


def packs_moved(row_bytes: int, is_narrow: bool) -> int:
    """How many packs of each input the plain kernel reads to move so many bytes in all."""
    return max(1, round(row_bytes / (PACK * (2.5 if is_narrow else 3))))
