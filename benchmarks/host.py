"""On the host: what an eager call at 4x8x128 costs the processor, launch included.

Every provider is a statement as a user writes it, everybody in turn in one process: in a tight
loop, and swept, one call at a time after 16 MB of other memory were written to, as inside an engine
whose caches are full of other things. In inference mode (with tensors made in it), under no_grad
and in grad mode.
"""

import contextlib
import timeit
from collections.abc import Callable
from functools import partial
from typing import Any

import torch

import merge_attn_states

from . import vllm
from .cases import HOST_CASE
from .check import check
from .operands import make_operands
from .results import Record
from .timing import Call, TimedCalls, Timing, medians, time_host

SWEPT_BYTES = 16 * 2**20
LINE = 64
TIGHT_CALLS, SWEPT_CALLS = 1000, 20  # a round
POSITIONAL = "output, prefix_output, prefix_lse, suffix_output, suffix_lse, output_lse"
KEYWORDS = ", ".join(f"{name}={name}" for name in POSITIONAL.split(", "))
MODES: dict[str, Callable[[], contextlib.AbstractContextManager[Any]]] = {
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "grad mode": contextlib.nullcontext,
}
Times = dict[str, dict[str, Timing]]  # regime: {provider: microseconds}


def timed_calls(device: torch.device, missing: dict[str, str]) -> TimedCalls:
    """Timed loops of each provider's statement, each after its answer was checked."""
    (operands,) = make_operands(HOST_CASE, 1, device)
    names: dict[str, Any] = operands._asdict() | {
        "torch": torch,
        "merge": merge_attn_states.merge_attn_states,
        "op": torch.ops.merge_attn_states.merge_attn_states,
    }
    statements = {
        "ours": f"merge({POSITIONAL})",
        "ours_keyword": f"merge({KEYWORDS})",
        "ours_ops": f"op({POSITIONAL})",
        "add": "torch.add(prefix_output, suffix_output, out=output)",
    }
    if device.type == "cuda" and "vllm" not in missing:
        names |= {"vllm_op": torch.ops._C.merge_attn_states, "vllm_merge": vllm.dispatcher()}
        statements["vllm"] = f"vllm_op({', '.join(vllm.argument_names())})"
        if names["vllm_merge"]:
            statements["vllm_dispatcher"] = f"vllm_merge({POSITIONAL})"
    timed = {}
    for provider, statement in statements.items():
        if provider != "add" and (reason := check(partial(exec, statement, names), operands)):
            raise SystemExit(f"{provider}: {statement}: {reason}")
        # The set-up reads the clock once: its code is then in the caches whatever was swept.
        timed[provider] = timeit.Timer(statement, "_timer()", globals=names).timeit
    return timed


def tight_and_swept(timed: TimedCalls, device: torch.device, rounds: int) -> Times:
    """Time calls in a tight loop, and one at a time after the sweep."""
    synchronize: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    memory, values = bytearray(SWEPT_BYTES), bytearray(SWEPT_BYTES // LINE)

    def sweep_idle() -> None:
        synchronize()
        memory[::LINE] = values  # every cache line, by as little code as Python has for it

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for run in timed.values():
        run(100)
    times = {
        "tight": time_host(timed, dict.fromkeys(timed, TIGHT_CALLS), rounds, synchronize),
        "swept": time_host(timed, dict.fromkeys(timed, 1), SWEPT_CALLS * rounds, sweep_idle),
    }
    torch.set_num_threads(threads)
    return times


def measure(device: torch.device, missing: dict[str, str], rounds: int) -> list[Record]:
    """A record for each mode and regime: microseconds, by provider."""
    records: list[Record] = []
    for mode, context in MODES.items():
        with context():
            times = tight_and_swept(timed_calls(device, missing), device, rounds)
        for regime, timings in times.items():
            record = {"case": f"{mode}, {regime}", "mode": mode, "regime": regime}
            records.append(record | {"us": medians(timings), "refused": {}})
    return records
