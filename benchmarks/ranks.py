"""A merge across ranks, each a process of its own: on its own GPU, or two of them on a CPU.

A case is what a rank brings: tokens x heads of the whole group x head size. Calls are timed by CUDA
graph replays, or on the host. Beside RankMerge stand vLLM's merges, an all-to-all of the outputs
alone, which merges nothing, and the formula in PyTorch behind one.
"""

import argparse
import datetime
import importlib
import json
import os
import timeit
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from merge_attn_states.distributed import RankMerge
from merge_attn_states.reference import merge_states_reference

from . import vllm
from .cases import ATTENTION, EAGERLY, PLAIN, TRAINING, Case
from .check import wrong
from .providers import Provider, prepare
from .results import Record
from .states import merge_many
from .timing import Call, Largest, medians, time_cuda, time_host

LIMIT = datetime.timedelta(seconds=60)  # of a collective
HOST_CALLS = 50  # a round, which a GPU's queue holds
SHAPES = [(1, 128, 512), (8, 16, 128), (64, 32, 128), (16, 128, 512)]
SHAPES += [(64, 128, 512), (256, 128, 512), (512, 32, 128)]
LAYERS = [(tokens, 16, 128) for tokens in (8192, 32768)]  # tokens of a rank
KINDS = {PLAIN: SHAPES, EAGERLY: SHAPES[1:3], ATTENTION: LAYERS, TRAINING: LAYERS}
CASES = [
    Case(*shape, kind=kind, size="x".join(map(str, shape)))
    for kind, shapes in KINDS.items()
    for shape in shapes
]


class Ranks:
    """A rank's state, beside those of all, which are random and the same on every rank."""

    def __init__(self, case: Case, device: torch.device) -> None:
        shape = tokens, heads, size = case.tokens, case.heads, case.head_size
        of: dict[str, Any] = {"dtype": case.input_dtype, "device": device}
        make = partial(RankMerge, max_tokens=tokens, num_heads=heads, head_size=size, **of)
        os.environ["MERGE_ATTN_STATES_DIRECT"] = "0"
        self.collective = make()
        del os.environ["MERGE_ATTN_STATES_DIRECT"]
        self.direct = make()
        self.rank, self.ranks = self.direct.rank, self.direct.ranks
        torch.manual_seed(0)
        self.outputs = torch.randn(self.ranks, *shape, **of)  # [ranks, tokens, heads, head_size]
        self.lses = 3 * torch.randn(self.outputs.shape[:3], device=device)
        self.output, self.lse = self.outputs[self.rank], self.lses[self.rank]
        self.buffer = self.direct.output_buffer(tokens).copy_(self.output)
        self.scratch = self.output.clone()  # for who writes into what it is given

    def shares(self) -> list[Tensor]:
        """Output and LSE as they are sent: [ranks, tokens, heads of a rank, ...]."""
        cut = (x.unflatten(1, (self.ranks, -1)) for x in (self.output, self.lse))
        return [x.movedim(1, 0).contiguous() for x in cut]


# Who is measured. A call returns the output of this rank's share of the heads, and perhaps its LSE.


def _no_direct(o: Ranks) -> str:
    transport = o.direct.transport
    return "" if transport == "direct" else f"states travel by {transport} here"


def _in_pytorch(o: Ranks) -> tuple[Tensor, Tensor]:
    sent = o.shares()
    come = [torch.empty_like(x) for x in sent]
    for each in zip(come, sent, strict=True):
        dist.all_to_all_single(*each)
    return merge_many(*come)


def _vllm_direct(o: Ranks) -> Call:
    """As vLLM's DirectDCPA2AWorkspace calls its op, over symmetric memory for these tokens."""
    from torch.distributed import _symmetric_memory as symmetric

    op, shares, device = torch.ops._C.direct_dcp_a2a_lse_reduce, o.shares(), o.output.device
    shared, pointers, held = [], [], []
    for shape, dtype in [*((x.shape, x.dtype) for x in shares), ((o.ranks,), torch.int32)]:
        memory = symmetric.empty((1, 2, *shape), dtype=dtype, device=device).zero_()
        torch.cuda.synchronize()
        handle = symmetric.rendezvous(memory, dist.group.WORLD.group_name)
        handle.barrier()
        peers = [handle.get_buffer(k, list(memory.shape), dtype, 0) for k in range(o.ranks)]
        pointers.append(torch.tensor([[x.data_ptr() for x in peers]], device=device))
        shared.append(memory)
        held += [handle, *peers]
    epoch = torch.zeros(1, dtype=torch.int64, device=device)

    def call(held: object = held) -> Tensor:
        merged = o.output.new_empty(shares[0].shape[1:])
        given = (o.output, o.lse, None, None, *(x[0] for x in (*pointers, *shared)), epoch[0:1])
        op(*given, merged, o.ranks, o.rank, len(o.output), True)
        return merged

    return call


def _vllm_function(name: str, o: Ranks) -> Call:
    """Over vLLM's plainest communicator, whose collectives are torch.distributed's."""
    group, function = dist.group.WORLD, getattr(importlib.import_module(vllm.RANKS), name)
    made = importlib.import_module(vllm.COMMUNICATOR).DeviceCommunicatorBase
    return partial(function, o.scratch, o.lse, made(group, o.output.device, group))


PROVIDERS: Sequence[Provider] = (
    Provider("ours", lambda o: partial(o.direct, o.output, o.lse), _no_direct),
    Provider("ours in its buffer", lambda o: partial(o.direct, o.buffer, o.lse), _no_direct),
    Provider("ours collective", lambda o: partial(o.collective, o.output, o.lse)),
    Provider("eager", lambda o: partial(_in_pytorch, o)),
    Provider("vllm", _vllm_direct),
    Provider("vLLM AG + RS", partial(_vllm_function, "cp_lse_ag_out_rs")),
    Provider("vLLM A2A", partial(_vllm_function, "dcp_a2a_lse_reduce")),
)


def check_ranks(call: Call, o: Ranks, largest: Largest) -> str:
    """What is wrong with a call's answer; one before it is made NaN, where new results will lie."""
    outputs, lses = (list(x.chunk(o.ranks, 2)[o.rank]) for x in (o.outputs, o.lses))
    due = merge_states_reference(outputs, lses)

    def answer() -> tuple[Tensor, ...]:
        o.scratch.copy_(o.output)
        results: Any = call()
        return results if isinstance(results, tuple) else (results,)

    for result in answer():
        result.fill_(torch.nan)
    del result  # or the next one would lie elsewhere
    found = zip(answer(), due, ((2e-2, 2e-2), (1e-4, 1e-3)), strict=False)  # perhaps no LSE
    return wrong(((one, one, here, *allowed) for one, here, allowed in found), largest)


def measure_merge(
    providers: Sequence[Provider], case: Case, device: torch.device, rounds: int, largest: Largest
) -> Record:
    """One case, on every rank at once; in inference mode, as engines call."""
    o = Ranks(case, device)
    timed, refused = prepare(providers, [o], partial(check_ranks, largest=largest))
    sent = o.shares()[0]
    timed["all-to-all"] = [partial(dist.all_to_all_single, torch.empty_like(sent), sent)]
    with torch.inference_mode():
        if case.kind == EAGERLY:
            loops = {name: timeit.Timer(calls[0]).timeit for name, calls in timed.items()}
            counts = dict.fromkeys(loops, HOST_CALLS)
            times = time_host(loops, counts, rounds, largest=largest)
        else:
            times = time_cuda(timed, rounds, largest)
    # All ranks have come this far, so nobody needs what is freed here.
    made = {"regime": "merges", "transport": o.direct.transport}
    return case.record() | made | {"us": medians(times), "refused": refused}


def largest_of_ranks(device: torch.device, values: Sequence[float]) -> list[float]:
    """The timer's `largest`."""
    told = torch.tensor([0, *values], dtype=torch.float64, device=device)
    dist.all_reduce(told, dist.ReduceOp.MAX)
    return told.tolist()[1:]


def measure(chosen: argparse.Namespace, missing: dict[str, str]) -> list[Record]:
    """Every case, as rank 0 tells it."""
    ranks = torch.cuda.device_count() if chosen.device.type == "cuda" else 2
    store = dist.TCPStore("127.0.0.1", 0, is_master=True)
    torch.multiprocessing.spawn(run_rank, (ranks, store.port, chosen, missing), ranks)
    return json.loads(store.get("records"))  # type: ignore[no-any-return]


def run_rank(rank: int, ranks: int, port: int, chosen: argparse.Namespace, missing: Any) -> None:
    """What each process does."""
    from . import layers  # half a second

    device, backend, asked = chosen.device, "gloo", PROVIDERS[:4]
    if device.type == "cuda":
        device, backend, asked = torch.device("cuda", rank), "nccl", PROVIDERS
        torch.cuda.set_device(device)
        vllm.load(chosen.vllm_op_library)
    torch.set_num_threads(max(1, torch.get_num_threads() // ranks))
    store = dist.TCPStore("127.0.0.1", port)
    dist.init_process_group(backend, None, LIMIT, ranks, rank, store)

    records, asked = [], [one for one in asked if one.name not in missing]
    for case in CASES:
        if chosen.case in case.name and (device.type == "cuda" or case.kind == EAGERLY):
            given = (case, device, chosen.rounds, partial(largest_of_ranks, device))
            is_layer = case.kind in (ATTENTION, TRAINING)
            records.append(layers.measure(*given) if is_layer else measure_merge(asked, *given))
    if rank == 0:
        store.set("records", json.dumps(records))
    dist.destroy_process_group()
