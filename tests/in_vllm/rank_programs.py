"""What test_vllm_ranks.py runs on every rank: vLLM's own group, and its merges across it."""

import importlib
import inspect
import itertools
import os
import sys
from types import ModuleType

import torch
from states_support import States, compare
from support import BF16, F16, F32, INF, NAN

from in_vllm import packages, workers
from merge_attn_states.integrations import vllm as plugin
from merge_attn_states.integrations._vllm_ranks import HOMES
from merge_attn_states.reference import merge_states_reference

LEAVES_THREADS = True  # vLLM's coordinator: see ranks_support.py
HEADS, SIZE, MOST_TOKENS = 6, 64, 33
FUNCTIONS = ("cp_lse_ag_out_rs", "dcp_a2a_lse_reduce", "cp_lse_ag_out_ar")
WORKSPACE, OF_WORKSPACE = "DirectDCPA2AWorkspace", "lse_reduce"


def theirs():
    """The merges across ranks in a module that bound them, and the formula beside them."""
    stranger = ModuleType("a_module_of_somebody_else")
    for home in HOMES:
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError:
            continue
        for name in (*FUNCTIONS, WORKSPACE, "_lse_weighted_combine"):
            if hasattr(module, name):
                setattr(stranger, name, getattr(module, name))
    sys.modules[stranger.__name__] = stranger
    return stranger


def states(ranks, tokens, dtype, device):
    """Of all ranks, the same everywhere; LSEs as the transpose of [heads, tokens]."""
    outputs = torch.randn(ranks, tokens, HEADS, SIZE).to(dtype).to(device)
    lses = 3 * torch.randn(ranks, HEADS, tokens)
    for nothing in (-INF, INF, NAN):
        lses[torch.rand(ranks, HEADS, tokens) < 0.1] = nothing
    return outputs, lses.to(device).mT


def requests(ranks, tokens, device):
    """Local lengths on each rank, where requests start, and which rows have no keys there."""
    starts = torch.tensor([0, tokens // 3, tokens // 3, tokens - 1], dtype=torch.int32)
    lengths = torch.randint(0, 2, (ranks, 3), dtype=torch.int32)
    empty = torch.ones(ranks, tokens, dtype=torch.bool)
    for rank, request in itertools.product(range(ranks), range(3)):
        empty[rank, starts[request] : starts[request + 1]] = lengths[rank, request] == 0
    return lengths.to(device), starts.to(device), empty.to(device)


class Merge:
    """One of vLLM's merges as its layers call it, now and as it was before it was replaced."""

    def __init__(self, name, stranger, group, dtype, device):
        self.name, self.combine, self.group = name, stranger._lse_weighted_combine, group
        self.device, self.workspace = device, None
        if name == OF_WORKSPACE:
            self.workspace = _workspace(getattr(stranger, WORKSPACE), group, dtype, device)
            self.now = getattr(stranger, WORKSPACE).lse_reduce
        else:
            self.now = getattr(stranger, name)
        self.own = inspect.unwrap(self.now)

    def __call__(self, merge, output, lse, on_e, asked, return_lse=True):
        if self.workspace is not None:
            return merge(self.workspace, output, lse, on_e, *asked.values()), None
        return merge(output, lse, self.group, return_lse=return_lse, is_lse_base_on_e=on_e, **asked)

    def mine(self):
        """Which heads a rank gets."""
        if self.name == "cp_lse_ag_out_ar":
            return slice(None)
        share = HEADS // self.group.world_size
        return slice(self.group.rank_in_group * share, (self.group.rank_in_group + 1) * share)

    def by_vllm(self, output, lse, on_e, asked, parts, part_lses):
        """Its own output; or by the formula that it tests its kernels by, where it has none: on a
        CPU, and of three ranks where it corrects before it gathers (Triton: powers of two alone).
        """
        corrects = self.name.startswith("cp_lse_ag_out")
        if self.device.type == "cpu" or (corrects and self.group.world_size == 3):
            return self.combine(parts, part_lses, is_lse_base_on_e=on_e).to(output.dtype)
        # Its functions write where their operands lie. The workspace's kernel gets its LSEs
        # contiguous, as its own layers have them.
        lse = lse.contiguous() if self.workspace is not None else lse.clone()
        return self(self.own, output.clone(), lse, on_e, asked)[0]


def _workspace(cls, group, dtype, device):
    if device.type == "cuda":
        shape = MOST_TOKENS, HEADS // group.world_size, SIZE
        return cls(group.device_group, device, *shape, dtype)
    made = object.__new__(cls)  # a CPU has no symmetric memory
    made.group = group.device_group
    return made


def repeatable(call, device):
    """Call once, and give what calls again: on a GPU as a CUDA graph, with what is in memory then.

    The first call makes what no capture can.
    """
    call()
    if device.type == "cpu":
        return call
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        results = call()

    def replay():
        graph.replay()
        return results

    return replay


def check(merge, ranks, dtype, on_e, tokens, by_requests):
    """A call and a repeated one with other contents are right, and no further off than vLLM's."""
    device, rank = merge.device, merge.group.rank_in_group
    outputs, lses = states(ranks, tokens, dtype, device)
    output, lse = outputs[rank].clone(), lses[rank].clone()
    lengths, starts, nobodys = requests(ranks, tokens, device)
    asked = {"seq_lens": lengths[rank].clone(), "query_start_loc": starts} if by_requests else {}
    again = repeatable(lambda: merge(merge.now, output, lse, on_e, asked), device)
    for is_repeated in (False, True):
        if is_repeated:
            outputs, lses = states(ranks, tokens, dtype, device)
            lengths, _, nobodys = requests(ranks, tokens, device)
            output.copy_(outputs[rank])
            lse.copy_(lses[rank])
            if by_requests:
                asked["seq_lens"].copy_(lengths[rank])
            result, result_lse = again()
        else:
            result, result_lse = merge(merge.now, output, lse, on_e, asked)
        absent = lses.isnan()
        if by_requests:
            absent = absent | nobodys.unsqueeze(2)
        heads = merge.mine()
        parts, part_lses, absent = (x[:, :, heads] for x in (outputs, lses, absent))
        given = {"lse_base": "e" if on_e else "2", "empty": list(absent)}
        due, due_lse = merge_states_reference(list(parts), list(part_lses), **given)
        compare(
            States(list(parts), list(part_lses), **given),
            result,
            due_lse.to(F32) if result_lse is None else result_lse,
        )
        masked = part_lses.masked_fill(absent, -INF).contiguous()
        own = merge.by_vllm(outputs[rank], lses[rank], on_e, asked, parts, masked)
        known = ~own.isnan()  # which 0.33's cp_lse_ag_out_rs gives where no rank has keys
        off, own_off = (torch.where(known, x - due, 0).abs().max() for x in (result, own))
        rounding = torch.finfo(F32).eps * parts.double().abs().max()  # as near as both get
        said = merge.name, dtype, on_e, tokens, by_requests, is_repeated, off, own_off
        assert off <= own_off + rounding, said
    if merge.workspace is None:
        alone = merge(merge.now, output, lse, on_e, asked, return_lse=False)
        assert torch.equal(alone, result)


def check_all(stranger, group, ranks, device, takes_requests):
    names = [*FUNCTIONS, OF_WORKSPACE] if hasattr(stranger, WORKSPACE) else FUNCTIONS
    for name, dtype in itertools.product(names, (BF16, F16, F32)):
        if name == OF_WORKSPACE and dtype == F32:
            continue  # vLLM makes none
        merge = Merge(name, stranger, group, dtype, device)
        for on_e, tokens in itertools.product((True, False), (1, MOST_TOKENS)):
            check(merge, ranks, dtype, on_e, tokens, False)
            if takes_requests and tokens > 1:
                check(merge, ranks, dtype, on_e, tokens, True)


def watch_layers(ranks, group, device):
    """What stands at the merges of an engine's layers (workers.py) sees them, and nothing else."""
    layers = importlib.import_module(workers.HOLDER)
    held = [getattr(layers, name) for name in workers.NAMES]
    rank, is_gpu = group.rank_in_group, device.type == "cuda"
    for name, own in zip(workers.NAMES, held, strict=True):
        results = {}
        outputs, lses = states(ranks, MOST_TOKENS, BF16, device)
        for way in ("ours", "float64", *(("checked", "vllm") if is_gpu else ())):
            workers.watch(None, way)
            merge = getattr(layers, name)
            assert merge is not own
            state = outputs[rank].clone(), lses[rank].clone()
            results[way] = merge(*state, group, is_lse_base_on_e=True)
            found = workers.seen(None)
            assert len(found) == (way != "float64")
            if way == "checked":
                assert found[0].ours <= found[0].theirs + found[0].rounding, found
        torch.testing.assert_close(results["ours"], results["float64"])
    assert [getattr(layers, name) for name in workers.NAMES] == held


def merges(rank, ranks, device):
    """Every merge, called as backends do, is right and no further off than vLLM's own."""
    torch.manual_seed(7)
    stranger = theirs()
    held = {name: getattr(stranger, name) for name in FUNCTIONS}
    plugin.register()
    found = plugin.status()
    assert found.active, found.reason
    assert found.across_ranks == "", found.across_ranks
    for name, own in held.items():
        assert f"{stranger.__name__}.{name}" in found.replaced
        assert inspect.unwrap(getattr(stranger, name)) is own
    if hasattr(stranger, WORKSPACE):
        assert f"{HOMES[0]}.{WORKSPACE}.{OF_WORKSPACE}" in found.replaced
    state = importlib.import_module("vllm.distributed.parallel_state")
    is_gpu = device.type == "cuda"
    backend = "nccl" if is_gpu else "gloo"
    # vLLM's own functions want its communicator, which it has for GPUs.
    group = state.GroupCoordinator([list(range(ranks))], rank, backend, is_gpu, group_name="dcp")
    is_engines = found.vllm == packages.ENGINE
    check_all(stranger, group, ranks, device, takes_requests=not is_engines)
    if is_engines:
        watch_layers(ranks, group, device)
    directly = is_gpu and os.environ.get("MERGE_ATTN_STATES_DIRECT") == "1"
    assert plugin.status().transports == ["direct" if directly else "collective"]
    assert plugin.status().fallbacks == {}
    plugin.restore()
    group.destroy()
