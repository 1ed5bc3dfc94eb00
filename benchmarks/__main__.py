"""`python -m benchmarks`: the merge against the memory's limit.

On a GPU the limit is the triad (triad.cu) over the same bytes in the same run; on the CPU it is
`torch.add(out=)` of the same dtype. Bytes are counted from the contract: three [N, H, D] operands
and three LSEs once.
"""

from __future__ import annotations

import argparse
from typing import NamedTuple

import torch

import merge_attn_states
from merge_attn_states.reference import merge_attn_states_reference

from .timing import buffer_sets, time_cpu, time_cuda
from .triad import triad


class Case(NamedTuple):
    """One shape; `layout` names how the [N, H, D] operands lie in memory."""

    tokens: int
    heads: int
    head_size: int
    dtype: torch.dtype = torch.bfloat16
    warm: bool = False
    layout: str = "contiguous"


class Operands(NamedTuple):
    output: torch.Tensor
    prefix_output: torch.Tensor
    prefix_lse: torch.Tensor
    suffix_output: torch.Tensor
    suffix_lse: torch.Tensor
    output_lse: torch.Tensor


CUDA_CASES = [
    Case(8192, 128, 128),
    Case(8192, 64, 64),
    Case(8192, 16, 128),
    Case(2048, 16, 128),
    Case(2048, 16, 128, warm=True),
    Case(256, 16, 128),
    Case(256, 16, 128, warm=True),
    Case(1, 128, 128, warm=True),
    Case(8192, 128, 128, torch.float16),
    Case(4096, 64, 128, torch.float32),
    *(Case(4096, 32, d) for d in (32, 48, 80, 96, 112, 192, 256)),
    Case(2048, 16, 512),
    Case(2048, 16, 576),
    Case(8192, 32, 128, layout="heads first"),
    Case(8192, 32, 128, layout="padded heads"),
    Case(8192, 32, 128, layout="8-byte aligned"),
    Case(8192, 32, 100),
    Case(8192, 32, 101),
]
CPU_CASES = [
    Case(1024, 64, 128, torch.float32),
    *(Case(2048, 64, 128, dtype) for dtype in (torch.bfloat16, torch.float16)),
    Case(4, 2, 128, torch.bfloat16),
]


def operands(case: Case, device: torch.device) -> Operands:
    """Random operands with a few empty rows."""
    n, h, d = case.tokens, case.heads, case.head_size

    def rows() -> torch.Tensor:
        if case.layout == "heads first":
            return torch.randn(h, n, d, device=device).to(case.dtype).transpose(0, 1)
        if case.layout == "padded heads":
            return torch.randn(n, h, d + d // 2, device=device).to(case.dtype)[..., :d]
        if case.layout == "8-byte aligned":
            shift = 8 // case.dtype.itemsize
            flat = torch.randn(n * h * d + shift, device=device).to(case.dtype)
            return flat[shift:].view(n, h, d)
        return torch.randn(n, h, d, device=device).to(case.dtype)

    def lse() -> torch.Tensor:
        values = 3 * torch.randn(h, n, device=device)
        values.view(-1)[:: max(7, h * n // 16)] = -torch.inf
        return values

    return Operands(rows(), rows(), lse(), rows(), lse(), lse())


def moved_bytes(case: Case) -> int:
    rows = case.tokens * case.heads
    return 3 * rows * (case.head_size * case.dtype.itemsize + 4)


def check(call: Operands) -> None:
    """A provider's answer is right before it is timed."""
    merge_attn_states.merge_attn_states(*call)
    sampled = slice(0, min(64, call.output.shape[0]))
    expected, expected_lse = merge_attn_states_reference(
        call.prefix_output[sampled],
        call.prefix_lse[:, sampled],
        call.suffix_output[sampled],
        call.suffix_lse[:, sampled],
    )
    tolerance = 8 * torch.finfo(call.output.dtype).eps
    torch.testing.assert_close(
        call.output[sampled].double(), expected, rtol=tolerance, atol=tolerance
    )
    torch.testing.assert_close(
        call.output_lse[:, sampled].double(), expected_lse, rtol=1e-6, atol=1e-6
    )


def run_cuda(case: Case, device: torch.device) -> str:
    moved = moved_bytes(case)
    sets = 1 if case.warm else buffer_sets(moved, device)
    calls = [operands(case, device) for _ in range(sets)]
    for call in calls:
        check(call)
    size = moved // 3 // 16 * 16
    buffers = [
        [torch.empty(size, dtype=torch.uint8, device=device).random_() for _ in range(3)]
        for _ in range(sets)
    ]
    times = time_cuda(
        {
            "ours": [lambda c=c: merge_attn_states.merge_attn_states(*c) for c in calls],
            "triad": [lambda b=b: triad(*b) for b in buffers],
        }
    )
    ours, ceiling = times["ours"], times["triad"]
    kernel = merge_attn_states.selected_kernel(*calls[0])
    return (
        f"{ours.median:8.2f} us [{ours.low:.2f}, {ours.high:.2f}]  "
        f"triad {ceiling.median:8.2f}  {moved / ours.median / 1e6:5.2f} TB/s  "
        f"of triad {ceiling.median / ours.median:5.3f}  {kernel.kernel}: {kernel.variant}"
    )


def add(a: torch.Tensor, b: torch.Tensor, out: torch.Tensor) -> None:
    torch.add(a, b, out=out)


def run_cpu(case: Case) -> str:
    call = operands(case, torch.device("cpu"))
    check(call)
    a, b, c = (torch.randn(case[:3]).to(case.dtype) for _ in range(3))
    times = time_cpu(
        {
            "ours": lambda: merge_attn_states.merge_attn_states(*call),
            "add": lambda: add(a, b, c),
        }
    )
    ours, ceiling = times["ours"], times["add"]
    return (
        f"{ours.median:8.1f} us  torch.add {ceiling.median:8.1f}  "
        f"{moved_bytes(case) / ours.median / 1e3:5.1f} GB/s  "
        f"of torch.add {ceiling.median / ours.median:5.3f}"
    )


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", default=default)
    arguments = parser.parse_args()
    device = torch.device(arguments.device)
    if device.type == "cuda":
        print(torch.cuda.get_device_name(device), "PyTorch", torch.__version__)
    for case in CUDA_CASES if device.type == "cuda" else CPU_CASES:
        line = run_cuda(case, device) if device.type == "cuda" else run_cpu(case)
        state = ("warm" if case.warm else "cold") if device.type == "cuda" else ""
        shape = f"{case.tokens}x{case.heads}x{case.head_size}"
        dtype = str(case.dtype).removeprefix("torch.")
        print(f"{shape:14} {dtype:8} {case.layout:14} {state:4} {line}", flush=True)


if __name__ == "__main__":
    main()
