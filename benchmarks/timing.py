"""The one timer of the benchmarks: microseconds a call, everybody in turn in one process.

GPU: each provider's calls are captured into a CUDA graph that walks over the sets of buffers
(together more than twice the L2, so that every call finds its inputs in DRAM; or one set), and the
graphs are replayed in turn. CPU and host: the same turns, by the monotonic clock. Where several
ranks measure together, a round begins on all of them at once and the slowest one's time counts.
"""

import statistics
import timeit
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import torch

Call = Callable[[], object]
TimedCalls = Mapping[str, Callable[[int], float]]  # by provider: seconds that so many calls take
# Of each number the largest that a rank has; all ranks come, and their streams are idle. Alone: it.
Largest = Callable[[Sequence[float]], list[float]]

ROUNDS = 9
WARM_UP_ROUNDS = 2  # bring the clocks up
GRAPH_US, GRAPH_CALLS = 1000.0, 12  # at least: a replay's cost and the events' resolution vanish
LEAD_CALLS = 4
AHEAD_CYCLES = 100_000  # 50 us in which the GPU sleeps and the host gets ahead of it


class Timing(NamedTuple):
    """Microseconds a call: the median of the rounds, and their lower and upper quartile."""

    median: float
    low: float
    high: float


def summary(rounds: list[float]) -> Timing:
    if len(rounds) < 2:
        return Timing(*rounds * 3)
    low, median, high = statistics.quantiles(rounds, n=4, method="inclusive")
    return Timing(median, low, high)


def medians(timings: Mapping[str, Timing]) -> dict[str, float]:
    return {name: timing.median for name, timing in timings.items()}


def _turns(names: Sequence[str], rounds: int) -> Iterator[tuple[int, list[str]]]:
    """Rounds, those that warm up below 0, each beginning with another provider."""
    for round_ in range(-WARM_UP_ROUNDS, rounds):
        first = round_ % max(1, len(names))
        yield round_, [*names[first:], *names[:first]]


def _events() -> list[torch.cuda.Event]:
    return [torch.cuda.Event(enable_timing=True) for _ in range(2)]  # type: ignore[no-untyped-call]


def buffer_sets(bytes_a_set: int, device: torch.device) -> int:
    """How many sets of buffers it takes to exceed twice the L2."""
    l2: int = torch.cuda.get_device_properties(device).L2_cache_size
    return max(2, -(-2 * l2 // bytes_a_set) + 1)


class _Replays:
    """A provider's calls as two CUDA graphs: the one that is timed, and a lead of the same calls.

    The lead is replayed in front, so that the timed graph finds the caches as its own calls leave
    them, and is itself launched while the GPU is busy.
    """

    def __init__(self, calls: Sequence[Call], largest: Largest) -> None:
        for call in calls:  # whatever happens once: compilation, allocation
            call()
        passes = -(-LEAD_CALLS // len(calls))
        self.lead = self._capture(calls, passes, None)
        start, end = _events()
        for _ in range(2):  # the first uploads the graph
            start.record()
            self.lead.replay()
            end.record()
        end.synchronize()
        pass_us = 1e3 * start.elapsed_time(end) / passes
        least = -(-GRAPH_CALLS // len(calls))
        repeats = int(*largest([max(least, round(GRAPH_US / pass_us))]))  # ranks call as often
        self.graph = self._capture(calls, repeats, self.lead.pool())
        self.calls = repeats * len(calls)

    @staticmethod
    def _capture(calls: Sequence[Call], repeats: int, pool: Any) -> torch.cuda.CUDAGraph:
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, pool=pool):
            for _ in range(repeats):
                for call in calls:
                    call()
        return graph


def time_cuda(
    providers: Mapping[str, Sequence[Call]], rounds: int = ROUNDS, largest: Largest = list
) -> dict[str, Timing]:
    """Time providers on the GPU, each given as one call for every set of buffers."""
    replays = {name: _Replays(calls, largest) for name, calls in providers.items()}
    events = {name: [_events() for _ in range(rounds)] for name in providers}
    for round_, names in _turns(list(providers), rounds):
        largest([])
        torch.cuda._sleep(AHEAD_CYCLES)  # type: ignore[no-untyped-call]
        for name in names:
            start, end = events[name][max(0, round_)]
            replays[name].lead.replay()
            start.record()
            replays[name].graph.replay()
            end.record()
        torch.cuda.synchronize()
    return {
        name: summary(largest([1e3 * s.elapsed_time(e) / one.calls for s, e in events[name]]))
        for name, one in replays.items()
    }


def time_host(
    timed: TimedCalls,
    calls: dict[str, int],
    rounds: int,
    before: Call = lambda: None,
    largest: Largest = list,
) -> dict[str, Timing]:
    """Time so many calls in a row of each provider, `before()` ahead of each row, untimed."""
    times: dict[str, list[float]] = {name: [] for name in timed}
    for round_, names in _turns(list(timed), rounds):
        for name in names:
            before()
            largest([])
            seconds = timed[name](calls[name]) / calls[name]
            if round_ >= 0:
                times[name].append(1e6 * seconds)
    return {name: summary(largest(values)) for name, values in times.items()}


def time_cpu(providers: Mapping[str, Call], rounds: int = ROUNDS) -> dict[str, Timing]:
    """Time providers on the CPU; short calls are repeated for 0.1 ms."""
    timed = {name: timeit.Timer(call).timeit for name, call in providers.items()}
    for run in timed.values():
        run(1)
    counts = {name: max(1, round(1e-4 / run(1))) for name, run in timed.items()}
    return time_host(timed, counts, rounds)
