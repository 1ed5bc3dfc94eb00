"""The one timer of the benchmarks.

GPU: each provider's calls are captured into a CUDA graph that walks over several sets of buffers
(together more than twice the L2, so that every call finds its inputs in DRAM; one set: warm), the
providers' graphs are replayed in turn within one process, and the median of the rounds counts.
CPU: the same turns, by the monotonic clock.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch

Call = Callable[[], None]


class Timing(NamedTuple):
    """Microseconds a call: the median of the rounds, and their lower and upper quartile."""

    median: float
    low: float
    high: float


def _summary(rounds: list[float]) -> Timing:
    low, median, high = statistics.quantiles(rounds, n=4)
    return Timing(median, low, high)


def buffer_sets(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of buffers it takes to exceed twice the L2."""
    l2 = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * l2 // bytes_a_set) + 1)


def time_cuda(providers: dict[str, Sequence[Call]], rounds: int = 21) -> dict[str, Timing]:
    """Time providers, each given as one call for every set of buffers.

    A graph holds at least 1 ms of work by a first estimate, so that the replay's own cost and the
    events' resolution vanish.
    """
    graphs, calls_in = {}, {}
    for name, calls in providers.items():
        for call in calls:
            call()
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for call in calls:
            call()
        torch.cuda.synchronize()
        estimate = (time.perf_counter() - begin) / len(calls)
        repeats = max(1, round(1e-3 / max(estimate, 1e-6) / len(calls)))
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for _ in range(repeats):
                for call in calls:
                    call()
        graphs[name], calls_in[name] = graph, repeats * len(calls)
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 3):
        for name, graph in graphs.items():
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            graph.replay()
            end.record()
            end.synchronize()
            if round_ >= 3:  # the first rounds bring the clocks up
                times[name].append(1e3 * start.elapsed_time(end) / calls_in[name])
    return {name: _summary(values) for name, values in times.items()}


def time_cpu(providers: dict[str, Call], rounds: int = 21) -> dict[str, Timing]:
    """Time providers on the CPU, in turn."""
    times: dict[str, list[float]] = {name: [] for name in providers}
    for round_ in range(rounds + 2):
        for name, call in providers.items():
            begin = time.perf_counter()
            call()
            if round_ >= 2:
                times[name].append(1e6 * (time.perf_counter() - begin))
    return {name: _summary(values) for name, values in times.items()}
