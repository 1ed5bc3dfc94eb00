"""What checks and measures merges across ranks inside vLLM, on a stand-in for its workers."""

import functools
import json
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from support import BF16, INF, NAN

from benchmarks.results import Results
from in_vllm import across_ranks, engine, observed, report, rounds, workers
from in_vllm.scenarios import LAYERS, SCENARIOS
from in_vllm.test_rigs import replace_processes
from merge_attn_states import merge_states

CPU = torch.device("cpu")
EAGER, GRAPHS = "ranks-ag_rs", "ranks-a2a-graphs"
GROUP = SimpleNamespace(world_size=2, rank_in_group=1, device_group=None)
CASE = "merge across ranks"


class States:
    """Of both ranks; the second is the one that these tests are on."""

    def __init__(self):
        torch.manual_seed(1)
        self.outputs, self.lses = torch.randn(2, 5, 4, 16).to(BF16), 3 * torch.randn(2, 4, 5).mT
        self.lses[0, 0], self.lses[1, 1], self.lses[:, 2] = NAN, INF, -INF

    def merged(self, output, lse, base="e"):
        """Of the heads that the second rank gets, with its own operands as they are now."""
        outputs, lses = [self.outputs[0], output], [self.lses[0], lse]
        empty = [lse[:, 2:].isnan() for lse in lses]
        return merge_states([x[:, 2:] for x in outputs], [x[:, 2:] for x in lses], empty=empty,
                            lse_base=base)[0]  # fmt: skip


@pytest.fixture
def layer(monkeypatch):
    """The module whose merges layers call: vLLM's own is wrong, and writes where operands lie."""
    states, module = States(), ModuleType("a_layer_of_vllm")
    monkeypatch.setitem(sys.modules, module.__name__, module)
    monkeypatch.setattr(workers, "HOLDER", module.__name__)
    monkeypatch.setattr(
        workers, "gathered", lambda x, _: list(states.outputs if x.ndim == 3 else states.lses)
    )

    def vllms(output, lse, group, *, is_lse_base_on_e=True):
        output.fill_(NAN)
        lse.fill_(NAN)
        return torch.full((5, 2, 16), 7.0, dtype=BF16)

    @functools.wraps(vllms)
    def ours(output, lse, group, *, is_lse_base_on_e=True):
        return states.merged(output, lse, "e" if is_lse_base_on_e else "2")

    module.states, module.ours = states, ours
    for name in workers.NAMES:
        setattr(module, name, ours)
    return module


def call(layer, **named):
    return layer.cp_lse_ag_out_rs(layer.states.outputs[1], layer.states.lses[1], GROUP, **named)


@pytest.mark.parametrize("on_e", [True, False])
def test_a_worker_checks_both(layer, on_e):
    workers.watch(None, "checked")
    result = call(layer, is_lse_base_on_e=on_e)
    assert result.isfinite().all()  # vLLM's got copies
    (checked,) = workers.seen(None)
    assert (checked.tokens, checked.heads, checked.head_size) == (5, 4, 16)
    assert checked.ours < 1e-2
    assert checked.theirs > 3
    assert 0 < checked.rounding < 1e-6
    assert layer.cp_lse_ag_out_rs is layer.dcp_a2a_lse_reduce is layer.ours
    assert workers.seen(None) == []


def test_a_nan_is_infinitely_far(layer):
    layer.dcp_a2a_lse_reduce = lambda *_, **__: torch.full((5, 2, 16), NAN)
    workers.watch(None, "checked")
    layer.dcp_a2a_lse_reduce(layer.states.outputs[1], layer.states.lses[1], GROUP)
    (checked,) = workers.seen(None)
    assert checked.ours == checked.theirs == INF


def test_a_worker_times_either(layer):
    for way, is_ours in (("ours", True), ("vllm", False)):
        workers.watch(None, way)
        results = [call(layer), call(layer)]
        us = workers.seen(None)
        assert len(us) == 2
        assert all(0 < each < 1e6 for each in us)
        assert bool((results[0] == 7).all()) is not is_ours
        layer.states = States()  # vLLM's wrote there


def test_a_worker_merges_in_float64(layer):
    workers.watch(None, "float64")
    result = call(layer)
    workers.seen(None)
    expected = call(layer)
    assert result.dtype == BF16
    torch.testing.assert_close(result, expected)


def test_what_ranks_exchange(tmp_path):
    if dist.is_initialized():
        pytest.skip("another test has a process group")
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        lse = torch.randn(4, 5).T
        (alone,) = workers.gathered(lse, SimpleNamespace(world_size=1, device_group=None))
        assert torch.equal(alone, lse)
    finally:
        dist.destroy_process_group()


def test_the_kernels_of_ours_are_counted(monkeypatch):
    class Profile:
        def __init__(self, activities):
            self.ran = []

        def start(self):
            self.ran.append("start")

        def stop(self):
            self.ran.append("stop")

        def key_averages(self):
            assert self.ran == ["start", "stop"]
            keys = {"void merge_attn_states::merge_peers<1>()": 124, "ncclDevKernel_AllGather": 9}
            return [SimpleNamespace(key=key, count=count) for key, count in keys.items()]

    monkeypatch.setattr(torch.profiler, "profile", Profile)
    workers.profile(None)
    assert workers.profiled(None) == 124


class Engine:
    """In the engine's place: one merge an answer, which two workers make alike."""

    across_ranks = ""

    def __init__(self, chosen, model):
        self.scenario = chosen

    def answer(self):
        layer = sys.modules["a_layer_of_vllm"]
        layer.states.__init__()
        return [[(1, -0.5), (2, float(call(layer).float().mean()))]]

    def timed_steps(self, steps):
        steps.append(1e4)
        return torch.no_grad()

    def in_workers(self, function, *args):
        return [function(None, *args)] * 2

    def plugin_in_worker(self):
        return {"active": True, "reason": "", "across_ranks": self.across_ranks, "fallbacks": {},
                "transports": [] if self.across_ranks else ["direct"]}  # fmt: skip


@pytest.fixture
def seen(layer, monkeypatch):
    """What the processes of these engines report, by the switch, as `engine.run` gives it."""
    kernels = iter([LAYERS * 31 + 5, 5])
    monkeypatch.setattr(workers, "profile", lambda _: None)
    monkeypatch.setattr(workers, "profiled", lambda _: next(kernels))
    monkeypatch.setattr(across_ranks, "Engine", Engine)

    def run(name, switch="1"):
        monkeypatch.setattr(Engine, "across_ranks", "" if switch == "1" else "it is off")
        found = across_ranks.run(SCENARIOS[name], "model")
        return json.loads(json.dumps(found)) | {"log": "INFO replaced"}

    return run


def test_an_eager_engine(seen, layer):
    found = seen(EAGER)
    assert found["title"].endswith("ag_rs, eager, direct")
    assert observed.proves_nothing(EAGER, found) == ""
    by = {(r["case"], r["regime"], r["provider"]): r for r in observed.records_of(EAGER, found)}
    error = by[CASE, "error of output", "ours"]
    assert (error["calls"], error["tokens"], error["heads"]) == (2, [5], 4)  # of both workers
    assert error["ours"] < 1e-2
    assert error["vllm"] > 3
    assert error["further_off"] == 0
    for provider in ("ours", "vllm"):
        assert by[CASE, "host", provider]["calls"] == rounds.ROUNDS
        share = by["all steps", "share", provider]
        assert share["merges"] == 1
        assert 0 < share["merge_share_of_wall"] < 1
    apart = {case: r["largest_logprob_difference"] for (case, regime, _), r in by.items()
             if regime == "answers"}  # fmt: skip
    assert apart["with the plugin, and without"] > 3
    assert apart["with the plugin, watched and not"] == 0
    assert apart["with the plugin, and a float64 merge"] < 1e-2
    assert layer.cp_lse_ag_out_rs is layer.ours


def test_engines_with_graphs(seen):
    on, off = seen(GRAPHS), seen(GRAPHS, "0")
    found = observed.with_and_without(on, off)
    assert observed.proves_nothing(GRAPHS, found) == ""
    records = observed.records_of(GRAPHS, found)
    assert {(r["case"], r["regime"]) for r in records if r["regime"] != "answers"} == {
        ("all steps", "share")
    }
    assert [r["provider"] for r in records if r["regime"] == "share"] == ["ours", "vllm"]
    assert "merges" not in records[0]
    for one, other in ((on, on), (off, off), (off, on)):
        with pytest.raises(SystemExit, match="with and without the plugin's merge"):
            observed.with_and_without(one, other)
    found["kernels"]["ours"] -= 1
    assert f"{LAYERS * 31 - 1} kernels of ours" in observed.proves_nothing(GRAPHS, found)


def test_an_engine_that_merges_as_vllm_does_proves_nothing(seen):
    found = seen(EAGER, "0")
    assert "vLLM merges across ranks: it is off" in observed.proves_nothing(EAGER, found)


def test_workers_that_differ_are_an_error(monkeypatch):
    from in_vllm import scenarios

    made = object.__new__(scenarios.Engine)
    states = [{"transports": ["direct"]}, {"transports": ["collective"]}]
    made.llm = SimpleNamespace(collective_rpc=lambda function, args: states)
    with pytest.raises(SystemExit, match="workers differ"):
        made.plugin_in_worker()


def test_ours_is_further_off_by_more_than_a_rounding():
    assert rounds.compared([1.5, 2.0], [1.0, 1.0], 0.5) == {
        "calls": 2, "ours": 2.0, "vllm": 1.0, "further_off": 1, "largest_excess": 1.0,
    }  # fmt: skip


@pytest.fixture
def started(seen, monkeypatch):
    starts = []

    def run(name, model, paths, log, *options, MERGE_ATTN_STATES_VLLM_DCP):  # noqa: N803
        starts.append((name, model.name, log.name, MERGE_ATTN_STATES_VLLM_DCP))
        return seen(name, MERGE_ATTN_STATES_VLLM_DCP)

    replace_processes(monkeypatch, run)
    return starts


def test_the_engines_are_started(started, tmp_path):
    file = tmp_path / "engine.json"
    options = ["--commit", "e" * 40, "--logs", str(tmp_path), "--output", str(file)]
    engine.main(["--only", EAGER, *options])
    engine.main(["--only", GRAPHS, *options])
    assert started == [(EAGER, "deepseek-32", f"{EAGER}.log", "1"),
                       (GRAPHS, "deepseek-32", f"{GRAPHS}.log", "1"),
                       (GRAPHS, "deepseek-32", f"{GRAPHS}-off.log", "0")]  # fmt: skip
    results = Results.load(file)
    assert list(results.runs) == [EAGER, GRAPHS]  # the later run merges into the file
    page = report.section([results])
    eager, _, with_graphs = page.partition("### In the engine, across ranks")
    assert report.NO_RANKS not in page
    assert "MLA on two GPUs" not in eager
    row = next(line for line in with_graphs.splitlines() if "a2a, CUDA graphs, direct | -" in line)
    assert row.endswith("| 10.00 (10.00-10.00) | 10.00 (10.00-10.00) | - | - | - | - |")
    assert f"| MLA on two GPUs, ag_rs, eager, direct | {CASE} | output | 2 | 5 |" in with_graphs
    results.runs.clear()
    assert report.NO_RANKS in report.section([results])


def test_two_gpus_are_wanted_for_these_alone(monkeypatch, capsys):
    monkeypatch.setattr(engine, "unfit", lambda ranks: "it takes 2 GPUs" if ranks > 1 else "")
    alone = ["final", "chunks", "cascade"]
    assert engine.fitting(None) == alone
    assert f"left out: {EAGER}: it takes 2 GPUs" in capsys.readouterr().out
    assert engine.fitting(["final"]) == ["final"]
    with pytest.raises(SystemExit, match=f"cannot run\n{EAGER}: it takes 2 GPUs"):
        engine.fitting(["final", EAGER])
