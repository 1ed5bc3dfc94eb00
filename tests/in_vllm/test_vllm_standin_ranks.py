"""The plugin's merges across ranks: its own logic, on a package in vLLM's place."""

import functools
import logging
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support import BF16, F32, INF, NAN, assert_bits

from in_vllm.standin import DCP_PARAMETERS, WORKSPACE_PARAMETERS
from merge_attn_states import merge_states
from merge_attn_states.integrations import vllm as plugin

NAMES = ("cp_lse_ag_out_rs", "cp_lse_ag_out_ar", "dcp_a2a_lse_reduce")
REQUESTS = f"{DCP_PARAMETERS}, seq_lens=None, query_start_loc=None"


@pytest.fixture(scope="module")
def group():
    """What vLLM's coordinator has: of this process alone, but it says that it has another."""
    if dist.is_initialized():
        pytest.skip("another test has a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    yield SimpleNamespace(world_size=2, rank_in_group=0, device_group=dist.group.WORLD)
    dist.destroy_process_group()


@pytest.fixture
def dcp(vllm):
    """The module of the merges across ranks; backends bound them before the plugin ran."""
    stand_in = vllm(dcp=REQUESTS)
    for name in NAMES:
        setattr(stand_in.early_backend, name, getattr(stand_in.dcp, name))
    plugin.register()
    return stand_in.dcp


def state(tokens=5, dtype=F32):
    lse = 3 * torch.randn(4, tokens).T
    lse[0, 0], lse[1, 1], lse[2, 2] = NAN, INF, -INF
    return torch.randn(tokens, 4, 16).to(dtype), lse


def merged(output, lse, **options):
    """Of one rank."""
    empty = options.pop("empty", None)
    absent = lse.isnan() if empty is None else lse.isnan() | empty
    return merge_states([output], [lse], empty=[absent], **options)


def test_they_are_replaced_wherever_they_are_bound(dcp, log):
    places = {f"vllm.{where}.{name}" for where in ("v1.attention.ops.dcp", "early_backend")
              for name in NAMES}  # fmt: skip
    places.add("vllm.v1.attention.ops.dcp.DirectDCPA2AWorkspace.lse_reduce")
    found = plugin.status()
    assert places <= set(found.replaced)
    assert found.across_ranks == ""
    assert found.transports == []
    plugin.restore()
    for own in (dcp.cp_lse_ag_out_rs, dcp.DirectDCPA2AWorkspace.lse_reduce):
        assert own.__code__.co_filename == dcp.__file__
    assert plugin.status().replaced == []
    plugin.register()
    (said,) = log(logging.INFO)
    assert "vllm.early_backend.cp_lse_ag_out_ar" in said
    assert "vllm.v1.attention.ops.dcp.DirectDCPA2AWorkspace.lse_reduce" in said


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("on_e", [True, False])
def test_a_merge(name, on_e, dcp, group):
    function = getattr(dcp, name)
    output, lse = state()
    base = "e" if on_e else "2"
    due = merged(output, lse, lse_base=base)
    assert_bits(function(output, lse, group, None, False, on_e), due[0])
    assert_bits(function(output, lse, cp_group=group, is_lse_base_on_e=on_e), due[0])
    kept = functools.partial(function, is_lse_base_on_e=on_e)  # as a layer keeps it
    for result, expected in zip(kept(output, lse, group, return_lse=True), due, strict=True):
        assert_bits(result, expected)
    # Requests of two, no and one row, then padding; the first has no keys here.
    lengths, starts = torch.tensor([0, 7, 3]).int(), torch.tensor([0, 2, 2, 3]).int()
    nobodys = torch.tensor([True, True, False, True, True]).unsqueeze(1).expand(-1, 4)
    (result, result_lse), due = (
        function(output, lse, group, None, True, on_e, lengths, starts),
        merged(output, lse, lse_base=base, empty=nobodys),
    )
    assert_bits(result, due[0])
    assert_bits(result_lse, due[1])
    named = {"seq_lens": lengths, "query_start_loc": starts}
    assert_bits(function(output, lse, group, is_lse_base_on_e=on_e, **named), due[0])
    assert dcp.calls == []
    assert plugin.status().transports == ["collective"]


@pytest.mark.parametrize("on_e", [True, False])
def test_the_workspaces_merge(on_e, dcp, group):
    workspace = dcp.DirectDCPA2AWorkspace(group.device_group)
    output, lse = state()
    base = "e" if on_e else "2"
    due = merged(output, lse, lse_base=base)[0]
    assert_bits(workspace.lse_reduce(output, lse, on_e), due)
    assert_bits(workspace.lse_reduce(output, lse, is_lse_base_on_e=on_e), due)
    assert_bits(workspace.lse_reduce(output, lse, on_e, None, None), due)  # as MLA's layers do
    lengths, starts = torch.tensor([0, 3]).int(), torch.tensor([0, 2, 4]).int()
    nobodys = torch.tensor([True, True, False, False, True]).unsqueeze(1).expand(-1, 4)
    due = merged(output, lse, lse_base=base, empty=nobodys)[0]
    assert_bits(workspace.lse_reduce(output, lse, on_e, lengths, starts), due)
    named = {"seq_lens": lengths, "query_start_loc": starts}
    assert_bits(workspace.lse_reduce(output, lse, on_e, **named), due)
    dcp.dcp_a2a_lse_reduce(output, lse, group)
    assert len(plugin._rank_merges._made) == 1  # of the same group, sizes and share
    assert dcp.calls == []
    assert plugin.status().transports == ["collective"]


def test_an_objects_plain_call_is_made_first(dcp, group):
    """As direct merges have it, without a look at the arguments; what it leaves is looked at."""
    output, lse = state()
    due = dcp.cp_lse_ag_out_rs(output, lse, group)
    (kind,) = plugin._rank_merges.plain
    calls, answer = [], ("merged", None)

    def plainly(*args):
        calls.append(args)
        return answer

    plugin._rank_merges.plain[kind] = plainly
    workspace = dcp.DirectDCPA2AWorkspace(group.device_group)
    lengths, starts = torch.tensor([3]).int(), torch.tensor([0, 2]).int()
    assert dcp.cp_lse_ag_out_rs(output, lse, group, None, True, False) == answer
    assert dcp.dcp_a2a_lse_reduce(output, lse, group) == "merged"
    assert workspace.lse_reduce(output, lse, True, lengths, starts) == "merged"
    assert calls == [(output, lse, None, "2", "empty", True),
                     (output, lse, None, "e", "empty", False),
                     (output, lse, (lengths, starts), "e", "empty", False)]  # fmt: skip
    answer = None
    assert_bits(dcp.cp_lse_ag_out_rs(output, lse, group), due)
    assert len(calls) > 3
    calls.clear()
    dcp.cp_lse_ag_out_ar(output, lse, group)  # of another object
    assert calls == []


def test_what_the_workspace_is_refused_goes_to_its_own(dcp, group):
    workspace = dcp.DirectDCPA2AWorkspace(group.device_group)
    output, lse = state()
    assert workspace.lse_reduce(output, lse.to(BF16), False) is output
    assert dcp.calls == ["lse_reduce"]
    assert list(plugin.status().fallbacks.values()) == [1]


def test_an_object_serves_calls_of_any_length(dcp, group):
    """What is longer than its memory goes in pieces."""
    for tokens in (5, 500, 512, 0, 1, 513, 1500):
        output, lse = state(max(tokens, 3))
        output, lse = output[:tokens], lse[:tokens]
        result, result_lse = dcp.cp_lse_ag_out_rs(output, lse, group, return_lse=True)
        due, due_lse = merged(output, lse)
        assert_bits(result, due)
        assert_bits(result_lse, due_lse)
    # Requests that begin, end and have no keys in one piece or several; then padding.
    lengths, starts = (
        torch.tensor([1, 0, 2, 0]).int(),
        torch.tensor([0, 400, 700, 1100, 1300]).int(),
    )
    nobodys = torch.ones(1500, 4, dtype=torch.bool)
    nobodys[:400] = nobodys[700:1100] = False
    result = dcp.dcp_a2a_lse_reduce(output, lse, group, None, False, True, lengths, starts)
    assert_bits(result, merged(output, lse, empty=nobodys)[0])
    assert len(plugin._rank_merges._made) == 1
    dcp.cp_lse_ag_out_ar(*state(), group)
    dcp.cp_lse_ag_out_rs(*state(dtype=BF16), group)
    assert len(plugin._rank_merges._made) == 3
    output, lse = state(600)
    assert dcp.cp_lse_ag_out_rs(output, lse[:599], group) is output  # the original's


@pytest.mark.parametrize(
    ("wrong", "said"),
    [
        (lambda output, lse: (output, lse.to(BF16)), "lse: expected torch.float32"),
        (lambda output, lse: (output, lse.T), r"lse: expected shape [#, #]"),
        (lambda output, lse: (output.unsqueeze(1), lse), "output: expected three dimensions"),
        (lambda output, lse: (output.int(), lse), "dtype: expected one of"),
        (lambda output, lse: (output, lse, None), ""),
    ],
)
def test_what_is_refused_goes_to_vllms_own(wrong, said, dcp, group, log):
    output, lse, *_ = operands = wrong(*state())
    requests = {"seq_lens": torch.ones(1).int()} if len(operands) == 3 else {}
    for _ in range(2):
        assert dcp.cp_lse_ag_out_rs(output, lse, group, **requests) is output
    assert dcp.calls == ["cp_lse_ag_out_rs"] * 2
    ((reason, count),) = plugin.status().fallbacks.items()
    assert count == 2
    assert said in reason
    (warning,) = log(logging.WARNING)
    assert "vLLM's own vllm.v1.attention.ops.dcp.cp_lse_ag_out_rs gets it" in warning


def test_one_rank_alone_is_vllms_own(dcp, group):
    alone = SimpleNamespace(world_size=1, rank_in_group=0, device_group=group.device_group)
    output, lse = state()
    assert dcp.cp_lse_ag_out_ar(output, lse, alone) is output
    assert plugin.status().transports == []


def test_during_a_capture_no_object_is_made(dcp, group, monkeypatch):
    output, lse = state()
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
        on_a_gpu = SimpleNamespace(shape=output.shape, ndim=3, dtype=F32, device=1, is_cuda=True)
        assert plugin._rank_merges.of(group.device_group, on_a_gpu, "heads") is None
        patch.setattr(plugin._rank_merges, "of", lambda *_: None)
        assert dcp.cp_lse_ag_out_rs(output, lse, group) is output
    assert dcp.calls == ["cp_lse_ag_out_rs"]


def test_a_failed_exchange_is_raised(dcp, group, monkeypatch):
    output, lse = state()
    dcp.cp_lse_ag_out_rs(output, lse, group)
    (made,) = plugin._rank_merges._made.values()

    def fail(*_, **__):
        raise RuntimeError("connection closed")

    monkeypatch.setattr(made._transport, "merge", fail)
    with pytest.raises(RuntimeError, match="connection closed"):
        dcp.cp_lse_ag_out_rs(output, lse, group)
    assert dcp.calls == []


def test_older_releases_have_fewer_parameters(vllm, group):
    stand_in = vllm(dcp=DCP_PARAMETERS)
    plugin.register()
    output, lse = state()
    found = stand_in.dcp
    assert_bits(found.dcp_a2a_lse_reduce(output, lse, group), merged(output, lse)[0])
    assert found.dcp_a2a_lse_reduce(output, lse.T, group) is output


@pytest.mark.parametrize(
    "parameters",
    [
        {"dcp": "cp_attn_out, cp_attn_lse"},
        {"dcp": f"group, {REQUESTS}"},
        {"dcp": REQUESTS, "workspace": f"{WORKSPACE_PARAMETERS}, out=None"},
        {"dcp": REQUESTS, "workspace": "self, partial_output, partial_lse"},
    ],
)
def test_another_shape_is_left_alone(parameters, vllm, log):
    stand_in = vllm(**parameters)
    for _ in range(2):
        plugin.register()
    found = plugin.status()
    assert found.active  # merges of two parts
    assert "is called otherwise" in found.across_ranks
    (warning,) = log(logging.WARNING)
    assert "leaves merges across ranks to vLLM" in warning
    assert stand_in.dcp.cp_lse_ag_out_rs.__code__.co_filename == stand_in.dcp.__file__


@pytest.mark.parametrize("switch", ["0", "off"])
def test_a_switch_of_their_own_takes_them_off(switch, vllm, log, monkeypatch):
    monkeypatch.setenv("MERGE_ATTN_STATES_VLLM_DCP", switch)
    vllm(dcp=REQUESTS)
    plugin.register()
    found = plugin.status()
    assert found.active
    assert found.across_ranks == "MERGE_ATTN_STATES_VLLM_DCP takes them off"
    assert not any("dcp" in place for place in found.replaced)
    assert log(logging.WARNING) == []
