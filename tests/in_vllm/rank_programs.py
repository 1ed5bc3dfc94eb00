"""What test_vllm_ranks.py runs on every rank: vLLM's own group, and its merges across it."""

import importlib
import itertools
import sys
from types import ModuleType

import torch
from states_support import States, compare
from support import BF16, F16, F32, INF, NAN

from merge_attn_states.integrations import vllm as plugin
from merge_attn_states.integrations._vllm_ranks import HOMES
from merge_attn_states.reference import merge_states_reference

HEADS, SIZE = 6, 64
ROUNDING = 4e-7  # of float32, where both are as near as it gets


def theirs():
    """The merges across ranks in a module that bound them, and the formula beside them."""
    stranger = ModuleType("a_module_of_somebody_else")
    for home in HOMES:
        try:
            module = importlib.import_module(home)
        except ModuleNotFoundError:
            continue
        for name in ("cp_lse_ag_out_rs", "cp_lse_ag_out_ar", "dcp_a2a_lse_reduce"):
            if hasattr(module, name):
                setattr(stranger, name, getattr(module, name))
        if hasattr(module, "_lse_weighted_combine"):
            stranger.combine = module._lse_weighted_combine
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


def merges(rank, ranks, device):
    """Every function, called as backends do, is right and no further off than vLLM's formula."""
    torch.manual_seed(7)
    stranger = theirs()
    plugin.register()
    found = plugin.status()
    assert found.active, found.reason
    assert found.across_ranks == "", found.across_ranks
    assert f"{stranger.__name__}.cp_lse_ag_out_rs" in found.replaced
    state = importlib.import_module("vllm.distributed.parallel_state")
    backend = "nccl" if device.type == "cuda" else "gloo"
    group = state.GroupCoordinator([list(range(ranks))], rank, backend, False, group_name="dcp")

    names = ("cp_lse_ag_out_rs", "dcp_a2a_lse_reduce", "cp_lse_ag_out_ar")
    takes_requests = "0.26." not in found.vllm
    cases = itertools.product(names, (BF16, F16, F32), (True, False), (1, 33), (True, False))
    for name, dtype, on_e, tokens, by_requests in cases:
        outputs, lses = states(ranks, tokens, dtype, device)
        lengths, starts, nobodys = requests(ranks, tokens, device)
        absent, options = lses.isnan(), {"is_lse_base_on_e": on_e}
        if by_requests and takes_requests and tokens > 1:
            absent = absent | nobodys.unsqueeze(2)
            options |= {"seq_lens": lengths[rank], "query_start_loc": starts}
        merge = getattr(stranger, name)
        output, lse = merge(outputs[rank], lses[rank], group, return_lse=True, **options)
        assert torch.equal(merge(outputs[rank], lses[rank], group, **options), output)

        mine = slice(None)
        if not name.endswith("ar"):
            mine = slice(rank * HEADS // ranks, (rank + 1) * HEADS // ranks)
        parts, part_lses = outputs[:, :, mine], lses[:, :, mine]
        absent = absent.expand_as(lses)[:, :, mine]
        given = {"lse_base": "e" if on_e else "2", "empty": list(absent)}
        compare(States(list(parts), list(part_lses), **given), output, lse)
        # Its own formula in plain PyTorch, against which it tests its kernels.
        masked = part_lses.masked_fill(absent, -INF).contiguous()
        own = stranger.combine(parts, masked, is_lse_base_on_e=on_e).to(dtype)
        due, _ = merge_states_reference(list(parts), list(part_lses), **given)
        off, own_off = ((x.double() - due).abs().max() for x in (output, own))
        assert off <= own_off + ROUNDING, (name, dtype, on_e, tokens, off, own_off)
    assert plugin.status().transports == ["collective"]
    assert plugin.status().fallbacks == {}
    plugin.restore()
    group.destroy()
