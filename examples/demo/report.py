"""What the demo shows: progress on stderr, tables, a time.

The time is an orientation, of one call repeated on the same operands; benchmarks/ measures.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager

import torch

REPEATS = 15


@contextmanager
def progress(steps: int) -> Iterator[Callable[[str], None]]:
    """Give a function that says which step begins.

    A bar where stderr is a terminal and rich is installed, else a line a step.
    """
    try:
        from rich.console import Console
        from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
    except ImportError:
        has_rich = False
    else:
        has_rich = sys.stderr.isatty()
    if not has_rich:
        done = 0

        def say(what: str) -> None:
            nonlocal done
            done += 1
            print(f"[{done}/{steps}] {what} ...", file=sys.stderr, flush=True)

        yield say
        return
    columns = (BarColumn(), TextColumn("{task.description}"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task("", total=steps)
        begun = False

        def advance(what: str) -> None:
            nonlocal begun
            bar.update(task, description=what, advance=1 if begun else 0)
            begun = True

        yield advance


def table(headings: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Columns as wide as their widest cell, text to the left and numbers to the right."""
    lines = [list(headings), *(list(row) for row in rows)]
    widths = [max(len(line[i]) for line in lines) for i in range(len(headings))]
    numeric = [all(row[i][:1].isdigit() for row in rows) for i in range(len(headings))]

    def aligned(line: list[str]) -> str:
        cells = zip(line, widths, numeric, strict=True)
        return "  ".join(
            cell.rjust(width) if right else cell.ljust(width) for cell, width, right in cells
        ).rstrip()

    rule = ["-" * width for width in widths]
    return "\n".join(aligned(line) for line in [lines[0], rule, *lines[1:]])


def device_name(device: torch.device) -> str:
    """What the result says it ran on."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"the CPU, {torch.get_num_threads()} threads"


def fastest_microseconds(call: Callable[[], None], device: torch.device) -> float:
    """The fastest of `REPEATS` calls; on a GPU with cold caches.

    The fastest, not the median: beside busy neighbours most calls wait for a time slice.
    """
    call()
    if device.type != "cuda":
        times = []
        for _ in range(REPEATS):
            start = time.perf_counter()
            call()
            times.append(time.perf_counter() - start)
        return min(times) * 1e6
    # 256 MB written before each call: they evict the caches and keep the queue filled, without
    # which the time between the two events is the processor's.
    scratch = torch.empty(1 << 28, dtype=torch.uint8, device=device)
    elapsed = []
    for _ in range(REPEATS):
        begin, end = (torch.Event(device, enable_timing=True) for _ in range(2))
        scratch.zero_()
        begin.record()
        call()
        end.record()
        end.synchronize()
        elapsed.append(begin.elapsed_time(end))
    return min(elapsed) * 1e3
