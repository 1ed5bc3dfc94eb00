"""A progress bar on a terminal that has rich, a line a group elsewhere."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TypeVar

T = TypeVar("T")


class Progress:
    """`follow` walks over a group's work and shows how far it is."""

    def __init__(self) -> None:
        self._bar = None
        if sys.stderr.isatty():
            try:
                from rich.console import Console
                from rich.progress import Progress as Bar
            except ImportError:
                return
            self._bar = Bar(console=Console(stderr=True), transient=True)

    @contextmanager
    def shown(self) -> Iterator[Progress]:
        if self._bar is None:
            yield self
        else:
            with self._bar:
                yield self

    def follow(self, group: str, work: Sequence[T]) -> Iterator[T]:
        begin = time.monotonic()
        task = self._bar.add_task(group, total=len(work)) if self._bar else None
        for one in work:
            yield one
            if self._bar and task is not None:
                self._bar.advance(task)
        print(f"{group}: {time.monotonic() - begin:.0f} s", file=sys.stderr, flush=True)
