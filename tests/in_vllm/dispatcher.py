"""vLLM's real dispatcher, as the plugin replaced it and as vLLM made it."""

from __future__ import annotations

import contextlib
import importlib
import inspect
from collections.abc import Callable, Iterator

from benchmarks import vllm

Merge = Callable[..., None]
OPS = "vllm._custom_ops"


def patched() -> Merge:
    """Return what a backend's `from ... import merge_attn_states` gives now."""
    merge: Merge = importlib.import_module(vllm.DISPATCHER).merge_attn_states
    return merge


@contextlib.contextmanager
def unpatched() -> Iterator[Merge]:
    """Give vLLM's own dispatcher, with vLLM's own op behind it: nothing of the plugin is left.

    The patched dispatcher does not ask for the op, so both can be timed in turn meanwhile.
    """
    ops = importlib.import_module(OPS)
    now = ops.merge_attn_states
    ops.merge_attn_states = inspect.unwrap(now)
    try:
        yield inspect.unwrap(patched())
    finally:
        ops.merge_attn_states = now
