"""Options that several commands take: a wrong one is an error before anything is measured."""

import argparse
import os
from pathlib import Path

import torch

from .cases import ALL_GROUPS, CPU_GROUPS, GPU_GROUPS, RANKS
from .timing import ROUNDS


def positive(text: str) -> int:
    value = int(text)
    if value < 1:
        raise argparse.ArgumentTypeError(f"expected 1 or more, got {value}")
    return value


def device(text: str) -> torch.device:
    try:
        found = torch.device(text)
    except RuntimeError as error:
        raise argparse.ArgumentTypeError(str(error).splitlines()[0]) from error
    there = {"cpu": 1, "cuda": torch.cuda.device_count()}
    if (found.index or 0) >= there.get(found.type, 0):
        raise argparse.ArgumentTypeError(f"expected cpu or a CUDA device of this PyTorch's: {text}")
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=device, default=default, help="cuda where it can, or cpu")


def add_measuring(parser: argparse.ArgumentParser) -> None:
    """What is measured, and on what."""
    known = f"{', '.join(GPU_GROUPS)}; default all, on a CPU {' and '.join(CPU_GROUPS)}; or {RANKS}"
    vllm = "vLLM's compiled op alone, out of its wheel; default $VLLM_OP_LIBRARY, else its package"
    library = os.environ.get("VLLM_OP_LIBRARY")
    add_device(parser)
    parser.add_argument("--only", nargs="+", metavar="GROUP", choices=ALL_GROUPS, help=known)
    parser.add_argument("--case", default="", metavar="TEXT", help="cases whose name has it alone")
    parser.add_argument("--rounds", type=positive, default=ROUNDS, help="timed in each process")
    parser.add_argument("--vllm-op-library", metavar="PATH", default=library, help=vllm)


def add_results(parser: argparse.ArgumentParser) -> None:
    """Where results go, and of which sources they are."""
    parser.add_argument("--output", type=Path, metavar="FILE", help="JSON, into which groups merge")
    parser.add_argument("--commit", metavar="HASH", help="of these sources, where there is no git")


def groups(chosen: argparse.Namespace) -> tuple[str, ...]:
    """The groups to measure, in their order."""
    if RANKS in (chosen.only or ()):
        has_one = chosen.device.type == "cuda" and torch.cuda.device_count() < 2
        if len(chosen.only) > 1 or has_one:
            raise SystemExit(f"benchmarks: {RANKS}: measured alone, on two GPUs or more or a CPU")
        return (RANKS,)
    here = GPU_GROUPS if chosen.device.type == "cuda" else CPU_GROUPS
    if absent := set(chosen.only or ()) - set(here):
        raise SystemExit(f"benchmarks: {' and '.join(sorted(absent))}: measured on a GPU only")
    return tuple(group for group in here if group in (chosen.only or here))
