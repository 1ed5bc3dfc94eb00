"""Kinds of values that several commands take: a wrong one is an error before anything is done."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch


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
    if found.type not in ("cpu", "cuda"):
        raise argparse.ArgumentTypeError(f"expected cpu or cuda, got {text}")
    if found.type == "cuda" and (found.index or 0) >= torch.cuda.device_count():
        raise argparse.ArgumentTypeError(f"this PyTorch sees no {text}")
    return found


def add_device(parser: argparse.ArgumentParser) -> None:
    default = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--device", type=device, default=default, help="cuda where it can, or cpu")


def add_results(parser: argparse.ArgumentParser, output: str) -> None:
    """Where results go, and of which sources they are."""
    parser.add_argument("--output", type=result_file, metavar="FILE", help=output)
    parser.add_argument(
        "--source-trees",
        metavar="csrc=HASH,python=HASH,commit=HASH",
        help="where there is no git: what git rev-parse HEAD:csrc, HEAD:python and HEAD say",
    )


def file(text: str) -> str:
    if not Path(text).is_file():
        raise argparse.ArgumentTypeError(f"{text} is no file")
    return text


def result_file(text: str) -> Path:
    """Where results can be written, which is found out before hours of them are lost."""
    path = Path(text)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("a"):
            pass
        if path.stat().st_size == 0:
            path.unlink()
    except OSError as error:
        raise argparse.ArgumentTypeError(f"{text} cannot be written: {error.strerror}") from error
    return path
