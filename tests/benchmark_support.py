"""Results of a GPU that nobody has: every case, every provider, times from a simple model."""

import subprocess
import sys
import zlib
from pathlib import Path

ROOT = Path(__file__).parents[1]
if str(ROOT) not in sys.path:  # the benchmark belongs to the source tree, not to the package
    sys.path.insert(0, str(ROOT))

from benchmarks.cases import COMPILED, GROUPS, HOST_CASE  # noqa: E402
from benchmarks.environment import tree_hash  # noqa: E402
from benchmarks.results import Results  # noqa: E402

NAMES = {"H100": "NVIDIA H100 80GB HBM3", "H200": "NVIDIA H200"}
TREES = {"csrc": "c" * 40, "python": "d" * 40}
HANDED_IN = ",".join(
    [*(f"{tree}={tree_hash(ROOT / tree)}" for tree in TREES), f"commit={'e' * 40}"]
)

# Microseconds before the first byte, cold and warm terabytes a second.
MODELS = {
    "triad": (1.00, 3.00, 6.2),
    "ours": (0.90, 3.01, 5.9),
    "ours_ops": (0.90, 3.01, 5.9),
    "vllm": (1.50, 2.90, 4.4),
    "flashinfer": (1.70, 2.75, 3.9),
    "compile": (2.40, 2.20, 3.2),
    "eager": (18.0, 0.40, 0.7),
}
ON_CPU = {
    "ours": (2.0, 0.021),
    "ours_ops": (2.0, 0.021),
    "eager": (25.0, 0.005),
    "add": (1.0, 0.022),
}
HOST = {  # tight, swept
    "ours": (3.9, 15.1),
    "ours_keyword": (4.0, 15.5),
    "ours_ops": (8.9, 30.2),
    "vllm": (9.4, 38.4),
    "vllm_dispatcher": (10.9, 41.7),
    "add": (6.6, 31.9),
    "bare_launch": (3.0, 9.8),
}


def command(*arguments):
    """`python -m benchmarks` as people call it: its status, and what it said."""
    ran = subprocess.run(
        [sys.executable, "-m", "benchmarks", *arguments],
        capture_output=True, text=True, cwd=ROOT, check=False,
    )  # fmt: skip
    return ran.returncode, ran.stdout + ran.stderr


def environment(machine, trees=TREES, **changed):
    return {
        "gpu": NAMES.get(machine, machine),
        "driver": "580.00",
        "torch": "2.11.0+cu130",
        "torch_cuda": "13.0",
        "build_cuda": "13.0",
        "compiler": "GCC 12.2.0",
        "vllm": "0.33.0",
        "vllm_op_library": "0123456789abcdef",
        "flashinfer": "0.7.2",
        "python": "3.12.3",
        "trees": dict(trees),
        "dirty": False,
        "quick": False,
    } | changed


def timed(us, key):
    """Three times around `us`, off by up to two percent, the same in every run."""
    median = us * (1 + (zlib.crc32(key.encode()) % 400 - 200) / 1e4)
    return {"median_us": median, "low_us": 0.99 * median, "high_us": 1.02 * median}


def circumstances(gpu):
    return {
        "date": "2026-01-02",
        "commit": "e" * 40,
        "cpu": "A processor",
        "threads": 16,
        "clocks": {"clocks.sm": "1980 MHz", "clocks.mem": "2619 MHz"} if gpu else {},
        "seconds": 1,
        "missing": {},
    }


def synthetic(gpu="H100", trees=TREES):
    faster = 1.4 if gpu == "H200" else 1.0
    results = Results(environment(gpu, trees))

    def record(group, case, provider, us):
        made = {"group": group} | case.record() | {"provider": provider}
        return made | timed(us, f"{gpu} {group} {case.name} {case.regime} {provider}")

    def refused(group, case, provider):
        made = {"group": group} | case.record() | {"provider": provider}
        return made | {"status": "not supported", "reason": "says so"}

    def time_of(case, provider):
        if case.regime == "cpu":
            latency, rate = ON_CPU[provider]
            return latency + case.bytes / rate / 1e6
        latency, cold, warm = MODELS[provider]
        rate = warm if case.regime == "warm" else cold * faster
        return latency + case.bytes / rate / 1e6

    for group, comparisons in GROUPS.items():
        records = []
        for comparison in comparisons:
            for case in comparison:
                providers = ["ours", "eager"] if group == "cpu" else ["ours", "vllm", "eager"]
                if group in ("small", "cpu"):
                    providers.append("ours_ops")
                if group != "cpu" and case.dtype in ("bfloat16", "float16") and case.heads < 128:
                    providers.append("flashinfer")
                if (group, case.name) in COMPILED:
                    providers.append("compile")
                special = {"layout", "output_dtype", "context_tokens"}
                for provider in providers:
                    if provider != "ours" and special & case.record().keys():
                        records.append(refused(group, case, provider))
                    else:
                        records.append(record(group, case, provider, time_of(case, provider)))
            ceiling = "add" if group == "cpu" else "triad"
            records.append(record(group, comparison[0], ceiling, time_of(comparison[0], ceiling)))
        results.add(group, results.environment, circumstances(gpu), records)

    host = []
    for place, regime in enumerate(("tight", "swept")):
        for provider, times in HOST.items():
            made = {"group": "host"} | HOST_CASE.record()
            made |= {"regime": regime, "provider": provider}
            made |= timed(times[place], f"{gpu} {regime} {provider}")
            host.append(made | {"processes": [made["median_us"]] * 3})
    results.add("host", results.environment, circumstances(gpu), host)
    return results
