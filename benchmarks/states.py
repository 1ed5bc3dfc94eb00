"""Many parts and running states, on a GPU: merge_states and update_state beside everybody else.

Two regimes, as for the pair: what a merge of few rows adds between neighbours (neighbours.py), and
cold, with inputs from DRAM (cold.py). The limit is the best plain kernel: one that reads as many
buffers and writes one; of a ring's step, an index and the backward pass the one that reads two,
over as many bytes; of a split's many parts one that only reads them.
"""

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor

from merge_attn_states import merge_attn_states, merge_states, update_state
from merge_attn_states.reference import merge_states_reference

from . import cold, kernels, neighbours
from .providers import Provider, prepare
from .results import Record
from .timing import Call, buffer_sets, time_cuda, time_host

LIST, STACK, SPLIT, BASE_2, INDEX = "list", "stack", "split", "base 2", "index"
STEP, HALF, BACKWARD = "ring step", "zigzag half", "backward"
KINDS = (LIST, STACK, SPLIT, BASE_2, INDEX, STEP, HALF, BACKWARD)
LN2 = math.log(2)
SAMPLED_TOKENS = 64


@dataclass(frozen=True)
class StatesCase:
    """`parts` of [*rows, 128] in bfloat16; a ring's state is in float32 and the first part."""

    kind: str
    parts: int
    rows: tuple[int, ...]  # [tokens, heads] or [batch, tokens, heads]
    regime: str

    @property
    def size(self) -> str:
        return "x".join(map(str, self.rows[-2:]))

    @property
    def name(self) -> str:
        parts = "" if self.kind in (STEP, HALF) else f"{self.parts} x "
        return f"{parts}{self.size}x128, {self.kind}"

    @property
    def is_ring(self) -> bool:
        return self.kind in (STEP, HALF)

    @property
    def bytes(self) -> int:
        """What must move, each once: parts and LSEs, and what is written."""
        rows, part, lse = math.prod(self.rows), 256, 4
        if self.is_ring:
            rows //= 1 + (self.kind == HALF)
            return rows * (2 * (2 * part + lse) + part + lse)
        if self.kind == BACKWARD:  # the output's gradient too; its LSE has none
            return rows * (2 * self.parts * (part + lse) + part)
        if self.kind == INDEX:  # half of each part's rows; 4 bytes an index a token
            halves = rows * self.parts * (part + lse) // 2
            return halves + rows * (part + lse) + self.rows[-2] * self.parts * 4
        return rows * (self.parts + 1) * (part + lse)


class States(NamedTuple):
    """The operands of a case."""

    case: StatesCase
    outputs: Tensor  # [parts, *rows, 128]; of a ring the block alone, [*rows, 128]
    lses: Tensor
    out: Tensor
    out_lse: Tensor
    index: list[Tensor] | None = None
    grad: Tensor | None = None  # of the output

    @property
    def options(self) -> dict[str, Any]:
        if self.case.kind == BASE_2:
            return {"lse_base": "2", "out_lse_base": "e"}
        return {"index": self.index} if self.index else {}

    @property
    def merged(self) -> tuple[Tensor, Tensor]:
        return self.out, self.out_lse

    @property
    def parts(self) -> tuple[list[Tensor], list[Tensor]]:
        return list(self.outputs.unbind()), list(self.lses.unbind())


def _cases() -> list[StatesCase]:
    near = [(k, n, h) for k in (2, 4, 8, 16) for n, h in ((1, 128), (64, 16))]
    near += [(8, 512, 16), (4, 2048, 16)]
    cases = [StatesCase(LIST, k, (n, h), "neighbours") for k, n, h in near]
    cases += [StatesCase(STACK, 8, (64, 16), "neighbours")]
    cases += [StatesCase(BASE_2, 2, (256, 16), "neighbours")]
    cases += [StatesCase(k, n, (8192, 32), "cold") for n in (2, 4, 8, 16) for k in (LIST, STACK)]
    cases += [StatesCase(SPLIT, 256, (8, 8), "cold")]
    cases += [StatesCase(INDEX, 3, (8192, 24), "cold")]
    cases += [
        StatesCase(kind, 2, (1, *rows), "cold")
        for rows in ((4608, 24), (32768, 10))
        for kind in (STEP, HALF)
    ]
    return cases + [StatesCase(BACKWARD, k, (8192, 32), "cold") for k in (2, 8)]


CASES = _cases()


def make_states(case: StatesCase, sets: int, device: torch.device) -> list[States]:
    """Random operands, a tuple a set."""
    bf16, f32 = ({"dtype": d, "device": device} for d in (torch.bfloat16, torch.float32))
    made = []
    for _ in range(sets):
        if case.is_ring:  # FlashAttention's [B, H, S] beside [B, S, H, D]
            batch, tokens, heads = case.rows
            block, state = (torch.randn(*case.rows, 128, **each) for each in (bf16, f32))
            lses = [3 * torch.randn(batch, heads, tokens, **f32).transpose(1, 2) for _ in range(2)]
            whole = (block, lses[0], state, lses[1])
            half = slice(tokens // 2 if case.kind == HALF else 0, None)
            made.append(States(case, *(tensor[:, half] for tensor in whole)))
            continue
        outputs = torch.randn(case.parts, *case.rows, 128, **bf16)
        lses = 3 * torch.randn(case.parts, *case.rows, **f32)
        one = States(case, outputs, lses, outputs.new_empty(*case.rows, 128), lses[0].clone())
        if case.kind == INDEX:
            one = one._replace(index=_indices(case, device))
        if case.kind == BACKWARD:
            one = one._replace(grad=torch.randn(*case.rows, 128, **bf16))
        made.append(one)
    return made


def _indices(case: StatesCase, device: torch.device) -> list[Tensor]:
    """Of each part every second row, as an engine's requests lie: runs of 64, in turn absent."""
    rows = torch.arange(case.rows[0], device=device, dtype=torch.int32)
    return [
        torch.where(((rows // 64 + k) % 2).bool(), rows // 128 * 64 + rows % 64, -1).int()
        for k in range(case.parts)
    ]


# Who is measured. Each call returns the merged output and LSE (and the ln of its base, if it is not
# the case's), or the gradients of the parts.


def _ours(o: States) -> Call:
    if o.case.is_ring:
        return lambda: (update_state(*o.merged, o.outputs, o.lses), o.merged)[1]
    if o.case.kind == BACKWARD:
        backward = torch.ops.merge_attn_states.merge_states_backward
        return lambda: backward(o.grad, None, *o.parts, [], [], None, None, "e", None)
    given: dict[str, Any] = {"out": o.out, "out_lse": o.out_lse} | o.options
    if o.case.kind in (STACK, SPLIT):
        return lambda: merge_states(o.outputs, o.lses, dim=0, **given)
    parts = o.parts
    return lambda: merge_states(*parts, **given)


def _pair(o: States) -> Call:
    """Section 2's op; of base-2 LSEs behind the four kernels that it takes to convert them."""
    parts, lses = o.parts

    def call() -> tuple[Tensor, Tensor]:
        a, b = lses
        if o.case.kind == BASE_2:
            a, b = ((lse * LN2).T.contiguous().T for lse in lses)
        merge_attn_states(o.out, parts[0], a.T, parts[1], b.T, o.out_lse.T)
        return o.merged

    return call


def _chain(o: States) -> Call:
    parts, lses = o.parts

    def call() -> tuple[Tensor, Tensor]:
        before = parts[0], lses[0].T
        for part, lse in zip(parts[1:], lses[1:], strict=True):
            merge_attn_states(o.out, *before, part, lse.T, o.out_lse.T)
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
        if o.case.is_ring:
            return partial(function, o.out, o.out_lse.unsqueeze(-1), o.outputs, o.lses)
        return partial(function, o.outputs, o.lses)

    return bind


def _flashinfer(o: States) -> Call:
    import flashinfer

    # Their parts are [tokens, parts, heads, size], LSEs to base 2: laid so beforehand, untimed.
    outputs, lses = (each.transpose(0, 1).contiguous() for each in (o.outputs, o.lses / LN2))
    return lambda: (*flashinfer.merge_states(outputs, lses), LN2)


def _not(*kinds: str) -> Callable[[States], str]:
    return lambda o: f"not {o.case.kind}" if o.case.kind in kinds else ""


def _pairs_alone(o: States) -> str:
    return "" if o.case.parts == 2 and o.case.kind in (LIST, BASE_2) else "not a pair"


def _chained_alone(o: States) -> str:
    return "" if o.case.parts > 2 and o.case.kind in (LIST, STACK) else "no chain"


_WITHOUT = (INDEX, BACKWARD, BASE_2)
PROVIDERS = (
    Provider("ours", _ours),
    Provider("pair", _pair, _pairs_alone),
    Provider("chain", _chain, _chained_alone),
    Provider("eager", _in_pytorch(False), _not(*_WITHOUT)),
    Provider("compile", _in_pytorch(True), _not(*_WITHOUT)),
    Provider("flashinfer", _flashinfer, _not(INDEX, BACKWARD, BASE_2, STEP, HALF)),
)


def check_states(call: Call, o: States) -> str:
    """Call once and say what is wrong with tokens from end to end, against float64."""
    tokens = o.out.shape[-3]
    sample = torch.linspace(0, tokens - 1, SAMPLED_TOKENS, device=o.out.device).long().unique()

    def sampled(output: Tensor, lse: Tensor) -> tuple[Tensor, Tensor]:
        at = output.detach().index_select(-3, sample), lse.detach().index_select(-2, sample)
        return at[0].double(), at[1].double()

    if o.case.kind == BACKWARD:
        parts = [sampled(*part) for part in zip(*o.parts, strict=True)]
        leaves = [[t.requires_grad_() for t in each] for each in zip(*parts, strict=True)]
        merged, _ = merge_states_reference(*leaves)
        grad = o.grad.index_select(-3, sample).double()  # type: ignore[union-attr]
        of_parts = torch.autograd.grad(merged, [*leaves[0], *leaves[1]], grad)
        due = list(zip(of_parts[: o.case.parts], of_parts[o.case.parts :], strict=True))
        outputs, lses, _ = call()  # type: ignore[misc]
        found = [sampled(*part) for part in zip(outputs, lses, strict=True)]
    else:
        parts = [(o.out, o.out_lse), (o.outputs, o.lses)]
        if not o.case.is_ring:
            parts = list(zip(o.outputs, o.lses, strict=True))
        base = {k: v for k, v in o.options.items() if k != "index"}
        index = [each[sample] for each in o.index] if o.index else None
        taken = [part if o.index else sampled(*part) for part in parts]
        due = [merge_states_reference(*zip(*taken, strict=True), index=index, **base)]
        if not o.case.is_ring:
            o.out.fill_(torch.nan)
            o.out_lse.fill_(torch.nan)
        output, lse, *of_base = call()  # type: ignore[misc]
        lse = lse.reshape(output.shape[:-1]) * (of_base[0] if of_base else 1.0)
        found = [sampled(output, lse)]
    try:
        for (output, lse), (of_output, of_lse) in zip(found, due, strict=True):
            tolerance = 1e-5 if o.out.dtype == torch.float32 else 2e-2
            torch.testing.assert_close(output, of_output, rtol=tolerance, atol=tolerance)
            torch.testing.assert_close(lse, of_lse, rtol=1e-4, atol=1e-3)
    except AssertionError as error:
        return " ".join(str(error).split())
    return ""


# How it is measured.


def measure(case: StatesCase, device: torch.device, rounds: int) -> Record:
    """One case: microseconds, by provider."""
    if case.regime == "neighbours":
        (states,) = make_states(case, 1, device)
        timed, refused = prepare(PROVIDERS, [states], check_states)
        middles = {name: calls[0] for name, calls in timed.items()} | _limits(states)
        halves = (neighbours.whole(each).chunk(2) for each in (states.outputs, states.lses))
        around = neighbours.neighbours_of(*halves, neighbours.whole(states.out))
        us = neighbours.added(around, middles, rounds)
    else:
        sets = make_states(case, buffer_sets(case.bytes, device), device)
        timed, refused = prepare(PROVIDERS, sets, check_states)
        if case.kind == SPLIT:
            sink = torch.empty(kernels.PACK, dtype=torch.uint8, device=device)
            timed["plain, reads alone"] = [partial(kernels.consume, o.outputs, sink) for o in sets]
        elif case.kind in (LIST, STACK):
            limits = [_limits(o, kernels.COLD_MANY) for o in sets]
            timed |= {name: [one[name] for one in limits] for name in limits[0]}
        else:
            timed |= cold.plain_kernels(case.bytes, len(sets), device)
        us = {name: timing.median for name, timing in time_cuda(timed, rounds).items()}
    fields = {"case": case.name, "kind": case.kind, "size": case.size, "parts": case.parts}
    return fields | {"regime": case.regime, "bytes": case.bytes, "us": us, "refused": refused}


def _limits(
    o: States, variants: dict[str, kernels.Variant] = kernels.BETWEEN_NEIGHBOURS
) -> dict[str, Call]:
    limits: dict[str, Call] = {
        f"plain, {name}": partial(kernels.plain_many, variant, o.outputs, o.out)
        for name, variant in variants.items()
    }
    if o.case.regime == "neighbours":
        limits["empty"] = partial(kernels.nothing, o.out.nbytes // kernels.PACK)
    return limits


def measure_host(device: torch.device, rounds: int) -> Record:
    """Host microseconds of a ring's step, launches included, and a compiled one's warm-up."""
    case = StatesCase(STEP, 2, (1, 64, 8), "host")
    (states,) = make_states(case, 1, device)
    with torch.inference_mode():
        timed, refused = prepare(PROVIDERS, [states], check_states)
        calls = {name: made[0] for name, made in timed.items()}
        begin = time.perf_counter()
        torch._dynamo.reset()
        _in_pytorch(True)(states)()
        warm_up = time.perf_counter() - begin

        def repeated(call: Call) -> Callable[[int], float]:
            def run(count: int) -> float:
                begin = time.perf_counter()
                for _ in range(count):
                    call()
                return time.perf_counter() - begin

            return run

        synchronize: Call = torch.cuda.synchronize if device.type == "cuda" else lambda: None
        loops = {name: repeated(call) for name, call in calls.items()}
        times = time_host(loops, dict.fromkeys(loops, 500), rounds, synchronize)
    us = {name: timing.median for name, timing in times.items()} | {"warm-up": 1e6 * warm_up}
    fields = {"case": "ring step, host", "kind": STEP, "size": case.size, "parts": 2}
    return fields | {"regime": "host", "bytes": case.bytes, "us": us, "refused": refused}


def measure_all(device: torch.device, rounds: int, named: str) -> Sequence[Record]:
    records = [measure(case, device, rounds) for case in CASES if named in case.name]
    return [*records, measure_host(device, rounds)] if named in "ring step, host" else records
