"""What limits each size on a GPU, by the GPU's counters; needs the CUDA toolkit's ncu.

    PYTHONPATH=python python scripts/profile_gpu.py

Each shape is profiled cold (ncu empties the caches first) and warm (after a call with the same
operands). The columns: throughput of DRAM, of L2 and of instruction issue in percent of the peak;
warps in percent of those that fit; the share of a warp's time that waits for loads and at the
barrier. A profiled kernel runs alone, so it takes longer here than in the benchmark.
"""

from __future__ import annotations

import csv
import io
import subprocess
import sys

SHAPES = [(1, 128, 128), (64, 16, 128), (256, 16, 128), (1024, 16, 128), (2048, 16, 96)]
SHAPES += [(2048, 16, 128), (512, 16, 512), (8192, 16, 128), (8192, 128, 128)]
CALLS = 3  # of each shape, the last of which is printed
LATENCY = "smsp__average_warp_latency_per_inst_issued.ratio"
STALLED = "smsp__average_warps_issue_stalled_{}_per_issue_active.ratio"
METRICS = {
    "us": "gpu__time_duration.sum",
    "DRAM %": "dram__throughput.avg.pct_of_peak_sustained_elapsed",
    "L2 %": "lts__throughput.avg.pct_of_peak_sustained_elapsed",
    "issue %": "smsp__issue_active.avg.pct_of_peak_sustained_active",
    "warps %": "sm__warps_active.avg.pct_of_peak_sustained_active",
    "waves": "launch__waves_per_multiprocessor",
    "registers": "launch__registers_per_thread",
    "loads %": STALLED.format("long_scoreboard"),
    "barrier %": STALLED.format("barrier"),
}


def call_each_shape() -> None:
    import torch

    from merge_attn_states import merge_attn_states

    for n, h, d in SHAPES:
        parts = torch.randn(2, n, h, d, device="cuda", dtype=torch.bfloat16)
        lses = torch.randn(3, h, n, device="cuda")
        output = torch.empty_like(parts[0])
        for _ in range(CALLS):
            merge_attn_states(output, parts[0], lses[0], parts[1], lses[1], lses[2])
        torch.cuda.synchronize()


def profile(*regime: str) -> list[list[str]]:
    """Rows of figures, one a shape."""
    command = ["ncu", "--csv", "--page", "raw", "--print-units", "base", "--clock-control", "none"]
    command += [*regime, "--kernel-name", "regex:merge_"]
    command += ["--metrics", ",".join([*METRICS.values(), LATENCY])]
    command += [sys.executable, __file__, "calls"]
    ran = subprocess.run(command, capture_output=True, text=True, check=False)
    if ran.returncode:
        raise SystemExit(f"{ran.stdout[-2000:]}{ran.stderr[-2000:]}")
    table = ran.stdout[ran.stdout.index('"ID"') :]
    _units, *launches = csv.DictReader(io.StringIO(table))
    return [row_of(launch) for launch in launches[CALLS - 1 :: CALLS]]


def row_of(launch: dict[str, str]) -> list[str]:
    row = []
    for title, metric in METRICS.items():
        value = float(launch[metric].replace(",", ""))
        if title == "us":
            value /= 1e3
        elif metric.startswith("smsp__average"):
            value *= 100 / float(launch[LATENCY])
        row.append(f"{value:.2f}" if title in ("us", "waves") else f"{value:.0f}")
    return row


def main() -> None:
    if sys.argv[1:] == ["calls"]:
        call_each_shape()
        return
    lines = [["bf16", *METRICS], ["---"] * (len(METRICS) + 1)]
    # Every set of counters runs the program again: ncu's own replay of one kernel restores memory
    # first, which changes what lies in the caches.
    warm = ("--cache-control", "none", "--replay-mode", "application")
    for regime, options in (("cold", ("--cache-control", "all")), ("warm", warm)):
        for (n, h, d), row in zip(SHAPES, profile(*options), strict=True):
            lines.append([f"{n}x{h}x{d} {regime}", *row])
    print("\n".join(f"| {' | '.join(line)} |" for line in lines))


if __name__ == "__main__":
    main()
