"""Many parts and running states: merge_states and update_state beside everybody else.

Regimes, as for the pair: what a merge of few rows adds between neighbours (neighbours.py); cold,
with inputs from DRAM (cold.py); a ring's step on the host; and on a CPU. The limit is the best
plain kernel: one that reads as many buffers and writes one; of a ring's step, an index and the
backward pass the one that reads two, over as many bytes; of a split's many parts one that only
reads them.
"""

import importlib
import math
import timeit
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from merge_attn_states import merge_attn_states, merge_states, update_state
from merge_attn_states.reference import merge_states_reference

from . import cold, kernels, neighbours
from .check import SAMPLED_TOKENS, wrong
from .providers import Provider, prepare
from .results import Record
from .states_cases import (
    BACKWARD,
    BASE_2,
    HALF,
    INDEX,
    LIST,
    SPLIT,
    STACK,
    STEP,
    States,
    StatesCase,
    make_states,
)
from .timing import Call, buffer_sets, medians, time_cpu, time_cuda, time_host

LN2 = math.log(2)
HOST_CALLS = 500  # a round


# Who is measured. Each call returns the merged output and LSE (and the ln of its base, if it is not
# the case's), or the gradients of the parts.


def _updated(out: Tensor, lse: Tensor, *block: Tensor) -> tuple[Tensor, Tensor]:
    update_state(out, lse, *block)
    return out, lse


def _ours(o: States) -> Call:
    if o.case.is_ring:
        return partial(_updated, *o.merged, o.outputs, o.lses)
    if o.case.kind == BACKWARD:
        backward = torch.ops.merge_attn_states.merge_states_backward
        return lambda: backward(o.grad, None, *o.parts, [], [], None, None, "e", None)
    given: dict[str, Any] = {"out": o.out, "out_lse": o.out_lse} | o.options
    if o.case.is_stacked:
        return lambda: merge_states(o.outputs, o.lses, dim=0, **given)
    parts = o.parts
    return lambda: merge_states(*parts, **given)


def _chain(o: States) -> Call:
    """Section 2's op, part after part; of base-2 LSEs behind the four kernels that convert them."""
    parts, lses = o.parts

    def call() -> tuple[Tensor, Tensor]:
        given = [lse.T for lse in lses]
        if o.case.kind == BASE_2:
            given = [(lse * LN2).contiguous() for lse in given]
        before = parts[0], given[0]
        for part in zip(parts[1:], given[1:], strict=True):
            merge_attn_states(o.out, *before, *part, o.out_lse.T)
            before = o.out, o.out_lse.T
        return o.merged

    return call


def ring_step(out: Tensor, lse: Tensor, block: Tensor, block_lse: Tensor) -> tuple[Tensor, Tensor]:
    """A ring's step as public rings write it: state [B, S, H, D] and [B, S, H, 1] in float32."""
    block_lse = block_lse.unsqueeze(-1)
    out = out - torch.sigmoid(block_lse - lse) * (out - block.to(torch.float32))
    return out, lse - torch.nn.functional.logsigmoid(lse - block_lse)


def merge_many(outputs: Tensor, lses: Tensor) -> tuple[Tensor, Tensor]:
    """Many parts as one writes them in PyTorch."""
    merged = torch.logsumexp(lses, 0)
    weights = torch.exp(lses - merged).unsqueeze(-1)
    return (weights * outputs).sum(0).to(outputs.dtype), merged


def _in_pytorch(compiled: bool) -> Callable[[States], Call]:
    def bind(o: States) -> Call:
        function: Callable[..., Any] = ring_step if o.case.is_ring else merge_many
        if compiled:
            torch._dynamo.config.recompile_limit = 1000
            function = torch.compile(function, dynamic=False)
        args: tuple[Tensor, ...] = (o.outputs, o.lses)
        if o.case.is_ring:
            args = (o.out, o.out_lse.unsqueeze(-1), *args)
        # As a program keeps them: memory that is freed at once is the next call's, in the caches.
        kept: list[Any] = []

        def call() -> Any:
            kept[:] = [function(*args)]
            return kept[0]

        return call

    return bind


def _flashinfer(o: States) -> Call:
    flashinfer = importlib.import_module("flashinfer")
    # Their parts are [tokens, parts, heads, size], LSEs to base 2: laid so beforehand, untimed.
    outputs, lses = (each.transpose(0, 1).contiguous() for each in (o.outputs, o.lses / LN2))
    return lambda: (*flashinfer.merge_states(outputs, lses), LN2)


def _takes(*kinds: str, least: int = 2, most: int = 256) -> Callable[[States], str]:
    def refuses(o: States) -> str:
        is_taken = o.case.kind in kinds and least <= o.case.parts <= most
        return "" if is_taken else f"{o.case.parts} parts, {o.case.kind}"

    return refuses


PROVIDERS = (
    Provider("ours", _ours),
    Provider("eager", _in_pytorch(False), _takes(LIST, STACK, SPLIT, STEP, HALF)),
    Provider("compile", _in_pytorch(True), _takes(LIST, STACK, SPLIT, STEP, HALF)),
    Provider("pair", _chain, _takes(LIST, BASE_2, most=2)),
    Provider("chain", _chain, _takes(LIST, STACK, least=3)),
    Provider("flashinfer", _flashinfer, _takes(LIST, STACK, SPLIT)),
)
ON_A_CPU = PROVIDERS[:2]


def check_states(call: Call, o: States) -> str:
    """Call once and say what is wrong with its answer: NaN, or a token from end to end."""
    rows = torch.linspace(0, o.out.shape[-3] - 1, SAMPLED_TOKENS, device=o.out.device).long()

    def sampled(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        at = output.detach().index_select(-3, rows), lse.detach().index_select(-2, rows)
        return at[0].double(), at[1].double()

    due: list[tuple[Tensor, ...]]
    if o.case.kind == INDEX:
        index = [each[rows] for each in o.rows_of or ()]
        due = [merge_states_reference(*o.parts, index=index)]
    elif o.grad is not None:
        leaves = [[t.requires_grad_() for t in part] for part in map(sampled, *o.parts)]
        merged, _ = merge_states_reference(*zip(*leaves, strict=True))
        grad = o.grad.index_select(-3, rows).double()
        due = [torch.autograd.grad(merged, leaf, grad, retain_graph=True) for leaf in leaves]
    else:
        due = [merge_states_reference(*zip(*map(sampled, *o.parts), strict=True), **o.options)]
    if not o.case.is_ring:  # there it is an input
        o.out.fill_(torch.nan)
        o.out_lse.fill_(torch.nan)
    answer: Any = call()
    output, lse, base = (*answer, 1.0)[:3]
    if o.case.kind == BACKWARD:
        found = list(zip(output, lse, strict=True))
    else:
        found = [(output, lse.reshape(output.shape[:-1]) * base)]
    tolerances = [(1e-5 if o.out.dtype == torch.float32 else 2e-2,) * 2, (1e-4, 1e-3)]
    return wrong(
        (*pair, *tolerance)
        for one, expected in zip(found, due, strict=True)
        for *pair, tolerance in zip(one, sampled(*one), expected, tolerances, strict=True)
    )


Times = dict[str, float]  # microseconds, by provider


def measure(
    case: StatesCase, providers: Sequence[Provider], device: torch.device, rounds: int
) -> Record:
    """One case."""
    how = {"neighbours": _added, "cold": _cold, "host": _on_host, "cpu": _on_cpu}[case.regime]
    sets = buffer_sets(case.bytes(), device) if case.regime == "cold" else 1
    with torch.inference_mode(case.regime == "host"):
        states = make_states(case, sets, device)
        timed, refused = prepare(providers, states, check_states)
        us = how(timed, states, rounds)
    return case.record() | selected_kernel(states[0]) | {"us": us, "refused": refused}


def selected_kernel(o: States) -> dict[str, str]:
    """Which kernel of ours runs; nothing of a backward pass, which cannot be asked."""
    op = torch.ops.merge_attn_states
    if o.case.is_ring:
        _, _, kernel, variant = op.inspect_update_state(*o.merged, o.outputs, o.lses)
    elif o.case.kind == BACKWARD:
        return {}
    else:
        parts, dim = (o.parts, None) if not o.case.is_stacked else (([o.outputs], [o.lses]), 0)
        bases = (o.options.get("lse_base", "e"), o.options.get("out_lse_base"))
        given: tuple[Any, ...] = (*o.merged, *parts, o.rows_of or [], [], dim, None, *bases)
        _, _, kernel, variant = op.inspect_merge_states(*given)
    return {"kernel": kernel, "variant": variant}


def _added(timed: cold.Timed, sets: list[States], rounds: int) -> Times:
    (o,) = sets
    middles: dict[str, Call] = {
        f"plain, {name}": partial(kernels.plain_many, variant, o.outputs, o.out)
        for name, variant in kernels.BETWEEN_NEIGHBOURS.items()
    }
    middles["empty"] = partial(kernels.nothing, o.out.nbytes // kernels.PACK)
    parts, lses = (neighbours.whole(each).chunk(2) for each in (o.outputs, o.lses))
    around = neighbours.neighbours_of(parts, lses, neighbours.whole(o.out))
    return neighbours.added(around, {name: c[0] for name, c in timed.items()} | middles, rounds)


def _cold(timed: cold.Timed, sets: list[States], rounds: int) -> Times:
    case, device = sets[0].case, sets[0].out.device
    if case.kind == SPLIT:
        sink = torch.empty(kernels.PACK, dtype=torch.uint8, device=device)
        timed["plain, reads alone"] = [partial(kernels.consume, o.outputs, sink) for o in sets]
    elif case.kind in (LIST, STACK):
        timed |= cold.plain_many_kernels(case.parts, case.bytes(), len(sets), device)
    else:
        timed |= cold.plain_kernels(case.bytes(), len(sets), device)
    return medians(time_cuda(timed, rounds))


def _on_host(timed: cold.Timed, sets: list[States], rounds: int) -> Times:
    """What an eager call costs, launches included, and a compiled one's first, caches empty."""
    first = {}
    if "compile" in timed:
        from torch._inductor.utils import fresh_cache

        torch._dynamo.reset()
        with fresh_cache():
            first["warm-up"] = 1e6 * timeit.timeit(_in_pytorch(True)(sets[0]), number=1)
    synchronize: Call = torch.cuda.synchronize if sets[0].out.is_cuda else lambda: None
    loops = {name: timeit.Timer(calls[0]).timeit for name, calls in timed.items()}
    return medians(time_host(loops, dict.fromkeys(loops, HOST_CALLS), rounds, synchronize)) | first


def _on_cpu(timed: cold.Timed, sets: list[States], rounds: int) -> Times:
    """torch.add's is of as many bytes."""
    (o,) = sets
    terms = o.out.new_ones(3, o.case.bytes() // (3 * o.out.itemsize))
    calls: dict[str, Call] = {name: calls[0] for name, calls in timed.items()}
    calls["add"] = partial(torch.add, *terms[:2], out=terms[2])
    return medians(time_cpu(calls, rounds))
