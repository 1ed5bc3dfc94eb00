"""Stands at every merge across ranks that an engine makes, in its workers: checks it, or times it.

Workers are processes of their own. The engine's calls `watch` and `seen` in each by
`LLM.collective_rpc`, in all of them alike, so that what a check exchanges is in step.
"""

from __future__ import annotations

import importlib
import inspect
import time
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from merge_attn_states.reference import merge_states_reference

Merge = Callable[..., Any]
HOLDER = "vllm.model_executor.layers.attention.mla_attention"  # looks them up at each call
NAMES = ("cp_lse_ag_out_rs", "dcp_a2a_lse_reduce")  # both give a rank its share of the heads

_held: dict[str, Merge] = {}
_seen: list[Any] = []
_profilers: list[torch.profiler.profile] = []


class Checked(NamedTuple):
    """One rank's call: its sizes, and how far results were from float64 at the most."""

    tokens: int
    heads: int
    head_size: int
    ours: float
    theirs: float
    rounding: float  # two of float32, at its largest value: the middle of two values goes to either


def watch(_worker: object, way: str) -> None:
    """Put one of WAYS in the place of this worker's merges."""
    holder = importlib.import_module(HOLDER)
    for name in NAMES:
        _held[name] = getattr(holder, name)
        setattr(holder, name, WAYS[way](_held[name]))


def seen(_worker: object) -> list[Any]:
    """What this worker has seen since; its merges are as they were."""
    holder = importlib.import_module(HOLDER)
    for name, merge in _held.items():
        setattr(holder, name, merge)
    found, _seen[:] = list(_seen), []
    return found


def profile(_worker: object) -> None:
    _profilers.append(torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CUDA]))
    _profilers[-1].start()


def profiled(_worker: object) -> int:
    """How many kernels of this package have run in this worker since, in CUDA graphs too."""
    profiler = _profilers.pop()
    profiler.stop()
    return sum(one.count for one in profiler.key_averages() if "merge_attn_states" in one.key)


def gathered(tensor: torch.Tensor, group: Any) -> list[torch.Tensor]:
    """Every rank's."""
    tensor = tensor.contiguous()
    all_ranks = [torch.empty_like(tensor) for _ in range(group.world_size)]
    dist.all_gather(all_ranks, tensor, group=group.device_group)
    return all_ranks


def exact(
    output: torch.Tensor, lse: torch.Tensor, group: Any, *, is_lse_base_on_e: bool = True
) -> torch.Tensor:
    """The merge in float64, of this rank's share of the heads."""
    share = output.shape[1] // group.world_size
    mine = slice(group.rank_in_group * share, (group.rank_in_group + 1) * share)
    outputs, lses = ([one[:, mine] for one in gathered(each, group)] for each in (output, lse))
    empty = [one.isnan() for one in lses]
    base = "e" if is_lse_base_on_e else "2"
    return merge_states_reference(outputs, lses, empty=empty, lse_base=base)[0]


def checking(merge: Merge) -> Merge:
    """Merge as it is now, and as vLLM does on copies of the operands; both against float64."""

    def check(output: torch.Tensor, lse: torch.Tensor, group: Any, **named: Any) -> Any:
        due = exact(output, lse, group, **named)
        theirs = inspect.unwrap(merge)(output.clone(), lse.clone(), group, **named)
        ours = merge(output, lse, group, **named)
        errors = ((each.double() - due).abs().nan_to_num(nan=torch.inf) for each in (ours, theirs))
        rounding = 2 * torch.finfo(torch.float32).eps * due.abs().max().item()
        _seen.append(Checked(*output.shape, *(error.max().item() for error in errors), rounding))
        return ours

    return check


def timing(merge: Merge) -> Merge:
    """Merge, and note the host's microseconds."""

    def timed(*args: Any, **named: Any) -> Any:
        begin = time.perf_counter_ns()
        result = merge(*args, **named)
        _seen.append((time.perf_counter_ns() - begin) / 1e3)
        return result

    return timed


def merging_in_float64(_merge: Merge) -> Merge:
    """Merge in float64 and round once."""

    def merge(output: torch.Tensor, lse: torch.Tensor, group: Any, **named: Any) -> torch.Tensor:
        return exact(output, lse, group, **named).to(output.dtype)

    return merge


WAYS: dict[str, Callable[[Merge], Merge]] = {
    "checked": checking,
    "ours": timing,
    "vllm": lambda merge: timing(inspect.unwrap(merge)),
    "float64": merging_in_float64,
}
