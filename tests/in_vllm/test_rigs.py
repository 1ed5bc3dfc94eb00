"""What measures and checks the merge inside vLLM, on a stand-in for it; the page that it makes."""

import importlib
import json
import re
import sys
from pathlib import Path

import pytest
import torch
from benchmark_support import stand_in_kernels
from support import assert_bits

from benchmarks.environment import ROOT
from benchmarks.results import Results
from in_vllm import (
    engine,
    gain,
    observed,
    packages,
    process,
    records,
    report,
    rounds,
    scenarios,
    watch,
)
from in_vllm.memory import copied
from in_vllm.patterns import PATTERNS
from in_vllm.scenarios import SCENARIOS
from merge_attn_states.integrations import vllm as plugin

CPU = torch.device("cpu")


def test_copies_keep_strides_and_aliases():
    for pattern in PATTERNS:
        operands = pattern.make(5, CPU)
        made = copied(operands)
        for one, other in zip(operands, made, strict=True):
            if not isinstance(one, torch.Tensor):
                assert one == other
                continue
            assert one.stride() == other.stride()
            assert one.data_ptr() != other.data_ptr()
            assert_bits(other, one)
        for a in range(6):
            for b in range(6):
                if operands[a] is not None and operands[b] is not None:
                    assert (operands[a].data_ptr() == operands[b].data_ptr()) == (
                        made[a].data_ptr() == made[b].data_ptr()
                    )


def test_gain(vllm, tmp_path, capsys):
    """The stand-in's own function fills its output with sevens: it is not timed."""
    vllm()
    file = tmp_path / "gain.json"
    common = ["--device", "cpu", "--quick", "--commit", "e" * 40]
    assert gain.main([*common, "--output", str(file)]) == 0
    results = Results.load(file)
    assert set(results.runs) == {"host"}  # a GPU's times are for a GPU
    ours = [r for r in results.records if r["provider"] == "ours"]
    theirs = [r for r in results.records if r["provider"] == "vllm"]
    assert {r["regime"] for r in results.select("host")} == {"tight", "swept"}
    assert {r["case"] for r in results.select("host")} == {one.name for one in PATTERNS}
    assert all(r["low_us"] <= r["median_us"] <= r["high_us"] for r in ours)
    assert {r["status"] for r in theirs} == {"wrong"}
    (keyword,) = {r["statement"] for r in ours if r["case"] == "MLA ping-pong buffers" and
                  "statement" in r}  # fmt: skip
    assert "merge(output=output, " in keyword
    assert "| cascade | wrong |" in report.section([results])
    assert "cascade  tight  vllm  Tensor-likes are not close!" in capsys.readouterr().out
    with pytest.raises(SystemExit, match="of --quick"):
        records.load([file])


def test_what_a_pattern_adds_between_neighbours(vllm, monkeypatch):
    vllm()
    stand_in_kernels(monkeypatch)
    with gain.both() as merges:
        for pattern in PATTERNS:
            records = gain.time_device(merges, pattern, 5, "neighbours", CPU)
            ours, theirs = sorted(records, key=lambda record: record["provider"])
            assert ours["median_us"] == 1  # a call of the stand-in timer
            assert theirs["status"] == "wrong"  # the stand-in fills its output with sevens


def test_what_went_back_to_vllm_is_not_published_as_ours(vllm):
    vllm()
    operands = PATTERNS[0].make(5, CPU)
    refused = operands._replace(prefix_lse=operands.prefix_lse.double())

    def measure():
        with gain.both() as merges:
            merges["ours"](*refused)

    with pytest.raises(SystemExit, match="calls went back to vLLM, none is timed"):
        measure()


@pytest.mark.parametrize("device", ["cuda", "cpu"])
def test_a_vllm_that_takes_triton_for_everything_is_not_timed(device, vllm, monkeypatch):
    """As it does on a GPU where a file that finds the platform is missing."""

    class UnspecifiedPlatform:
        def is_cuda(self):
            return False

        def is_cpu(self):
            return False

    monkeypatch.setattr(vllm().platforms, "current_platform", UnspecifiedPlatform())
    refused = rf"does not go its own way on {device}.*UnspecifiedPlatform"
    with pytest.raises(SystemExit, match=refused):
        gain.check_own_way(torch.device(device))


class Engine:
    """In the engine's place: two merges an answer, through a backend's module."""

    def __init__(self, chosen, model):
        self.scenario = chosen
        self.backend = importlib.import_module("vllm.early_backend")

    def answer(self):
        for make in (PATTERNS[0].make, PATTERNS[3].make):  # cascade; ping-pong, with an LSE
            named = {k: v for k, v in make(5, CPU)._asdict().items() if v is not None}
            self.backend.by_keyword(**named)
        return [[(1, -0.5), (2, float(named["output"].float().mean()))]]

    def timed_steps(self, steps):
        steps.append(1e4)  # microseconds; two merges are far less on any machine, and not nothing
        return torch.no_grad()


@pytest.fixture
def seen(vllm, monkeypatch):
    """What an engine's process reports."""
    stand_in = vllm()
    plugin.register()
    stand_in.early_backend  # noqa: B018  loads it
    monkeypatch.setattr(watch, "HOLDERS", ("vllm.early_backend", "vllm.not_there"))
    monkeypatch.setattr(process, "Engine", Engine)
    monkeypatch.setattr(
        process, "profiled_round", lambda *_: {"all_us": 100.0, "merge_us": 2.0, "merges": 2}
    )
    return json.loads(json.dumps(process.run(SCENARIOS["chunks"], "model")))


def test_an_engine_is_checked_and_timed(seen):
    found = observed.records_of("chunks", seen)
    by = {(r["case"], r["regime"], r["provider"]): r for r in found}
    for case, result in (("MLA final merge", "output"), ("MLA chunk loop", "output_lse")):
        error = by[case, f"error of {result}", "ours"]
        assert error["calls"] == 1
        assert error["ours"] < 1e-2
        assert error["tokens"] == [5]
    assert by["MLA final merge", "error of output", "ours"]["vllm"] > 3  # sevens
    assert by["MLA final merge", "error of output", "ours"]["further_off"] == 0
    for provider in ("ours", "vllm"):
        assert by["MLA chunk loop", "host", provider]["calls"] == rounds.ROUNDS
        share = by["all steps", "share", provider]
        assert 0 < share["merge_share_of_wall"] < 1
        assert share["merge_share_of_gpu"] == 0.02
    assert observed.proves_nothing("chunks", seen) == ""
    twice = by["with the plugin, twice", "answers", "ours"]
    assert (twice["tokens"], twice["same_tokens"]) == (2, 2)
    assert plugin.status().active  # nothing that watched is left behind
    assert importlib.import_module("vllm.early_backend").merge_attn_states.__wrapped__


def test_an_engine_that_proves_nothing(seen):
    assert "the plugin is not used" in observed.proves_nothing(
        "chunks", seen | {"plugin": {"active": False, "reason": "for the test"}}
    )
    assert "went back to vLLM" in observed.proves_nothing(
        "chunks", seen | {"fallbacks": {"why": 3}}
    )
    final = [one for one in seen["checked"] if one["case"] == "MLA final merge"]
    assert "did not merge as it should: MLA chunk loop" in observed.proves_nothing(
        "chunks", seen | {"checked": final}
    )
    none = {"all_us": 1.0, "merge_us": 0.0, "merges": 0}
    assert "not profiled" in observed.proves_nothing(
        "chunks", seen | {"profiled": seen["profiled"] | {"vllm": none}}
    )


def test_an_engine_without_the_plugin_says_so(vllm, monkeypatch):
    vllm()
    monkeypatch.setattr(process, "Engine", Engine)
    plugin.restore()
    found = process.run(SCENARIOS["final"], "model")
    assert set(found) == {"title", "plugin", "first"}
    assert not found["plugin"]["active"]


def replace_processes(monkeypatch, run):
    """The engine's command runs here, without a GPU, a network or a model."""
    for name, value in {
        "unfit": lambda ranks: "", "fetch": lambda: None, "install": lambda target: None,
        "save_model": lambda name, folder: folder.mkdir(), "run": run, "DEVICE": CPU,
    }.items():  # fmt: skip
        monkeypatch.setattr(engine, name, value)


@pytest.fixture
def started(seen, monkeypatch):
    """The command, with what each process would report in place of the processes."""
    starts = []

    def run(name, model, paths, log, *options, **variables):
        starts.append((name, model.name, *options, variables))
        if variables or options:
            plugin = {"active": not variables, "fallbacks": {}}
            return {"plugin": plugin, "first": seen["answers"]["vllm"]}
        return seen | {"log": "INFO replaced", "title": name, "differences": {}}

    replace_processes(monkeypatch, run)
    return starts


def test_the_engines_are_started_and_one_without_the_plugin(started, tmp_path, capsys):
    file = tmp_path / "engine.json"
    options = ["--commit", "e" * 40, "--logs", str(tmp_path), "--output", str(file)]
    engine.main(["--only", "chunks", "final", *options])
    off = {"MERGE_ATTN_STATES_VLLM": "0"}
    assert started == [("chunks", "deepseek", {}), ("chunks", "deepseek", off),
                       ("final", "deepseek", {}), ("chunks", "deepseek", "--as-served", {}),
                       ("chunks", "deepseek", "--as-served", off)]  # fmt: skip
    results = Results.load(file)
    assert list(results.runs) == ["chunks", "final"]
    assert "off" in results.runs["chunks"]
    assert "off" not in results.runs["final"]
    assert results.runs["chunks"]["served"]["plugin"]["active"]
    answers = [r for r in results.records if r["regime"] == "answers"]
    assert [(r["group"], r["same_tokens"]) for r in answers] == [("chunks", 2)] * 2
    page = report.section([results])
    assert "| chunks | started without it, and taken off |" in page
    assert f"| chunks | {observed.SERVED_CASE} |" in page
    assert "regime=share" in capsys.readouterr().out


def test_a_result_that_is_further_off_is_an_error(started, seen, tmp_path):
    seen["checked"][0] |= {"further_off": 3, "largest_excess": 1e-7}
    file = tmp_path / "engine.json"
    options = ["--commit", "e" * 40, "--logs", str(tmp_path), "--output", str(file)]
    with pytest.raises(SystemExit, match=r"further off than vLLM's own:\n  chunks: .*: 3 of "):
        engine.main(["--only", "chunks", *options])
    assert Results.load(file).runs  # what was seen is kept


def test_an_engine_that_keeps_the_plugin_is_no_comparison(seen):
    with pytest.raises(SystemExit, match="did not take the plugin off"):
        observed.compare_taken_off(seen, {"plugin": {"active": True}})


def test_an_engine_as_served(vllm, monkeypatch):
    vllm()

    class Served(Engine):
        def __init__(self, chosen, model, as_served):
            assert as_served
            super().__init__(chosen, model)

        def plugin_in_worker(self):
            return scenarios._plugin_status(None)

    monkeypatch.setattr(process, "Engine", Served)
    plugin.register()
    found = process.run_as_served(SCENARIOS["final"], "model")
    assert found["plugin"]["active"]
    plugin.restore()
    without = process.run_as_served(SCENARIOS["final"], "model")
    told, record = observed.compare_served(found, without)
    assert told["plugin"] == found["plugin"]
    assert record["tokens"] == 2
    with pytest.raises(SystemExit, match="in the worker"):
        observed.compare_served(without, without)
    went_back = found | {"plugin": found["plugin"] | {"fallbacks": {"why": 1}}}
    with pytest.raises(SystemExit, match="went back to vLLM"):
        observed.compare_served(went_back, without)


def test_differences_end_at_the_first_other_token():
    ours = [[(1, -1.0), (2, -2.0), (3, -3.0)]]
    theirs = [[(1, -1.25), (4, -9.0), (3, -3.5)]]
    assert rounds.differences(ours, theirs) == {
        "tokens": 3, "same_tokens": 2, "compared_logprobs": 1, "largest_logprob_difference": 0.25,
    }  # fmt: skip


def test_a_nan_is_infinitely_far_and_an_empty_row_is_right():
    operands = PATTERNS[3].make(5, CPU)
    expected = operands.suffix_output.double(), operands.suffix_lse.double()
    assert watch.far(operands, expected) == (torch.inf, torch.inf)
    operands.output.copy_(operands.suffix_output)
    operands.output_lse.copy_(operands.suffix_lse)
    for lse in (operands.output_lse, expected[1]):
        lse[:, 2] = -torch.inf
    assert watch.far(operands, expected) == (0.0, 0.0)
    assert rounds.compared([torch.inf, 2.0], [torch.inf, 1.0]) == {
        "calls": 2, "ours": torch.inf, "vllm": torch.inf, "further_off": 1, "largest_excess": 1.0,
    }  # fmt: skip


def test_what_an_engine_lacks_is_said(monkeypatch):
    if not torch.cuda.is_available():
        with pytest.raises(SystemExit, match="this PyTorch sees no GPU"):
            engine.main([])
    for module in (engine, packages):
        monkeypatch.setattr(module, "FOLDER", ROOT / "nowhere")
    monkeypatch.setattr(engine.subprocess, "run", lambda *_, **__: type("R", (), {"returncode": 1}))
    with pytest.raises(SystemExit, match=r"lacks, of vLLM:\n  0.26.0/vllm/_C_stable") as caught:
        engine.fetch()
    for name in packages.listed("engine_wheels.txt"):
        assert f"engine/: a wheel of {name}\n" in str(caught.value)


def test_what_was_fetched_outlives_a_fetch_that_fails(monkeypatch, tmp_path):
    """Of another Python, say: the one that it serves shall find it again."""
    monkeypatch.setattr(packages, "FOLDER", tmp_path)
    monkeypatch.setattr(packages, "NEEDS", tmp_path / "needs")
    made = tmp_path / "needs" / "made_of"
    made.parent.mkdir()
    made.write_text("another Python's")
    monkeypatch.setattr(packages, "run_pip", lambda *_: False)
    with pytest.raises(SystemExit, match="pip could not fetch that"):
        packages.fetch_needs()
    assert made.read_text() == "another Python's"

    def install(*arguments):
        Path(arguments[arguments.index("--target") + 1]).mkdir()
        return True

    monkeypatch.setattr(packages, "run_pip", install)
    packages.fetch_needs()
    assert made.read_text().startswith(sys.version)
    assert list(tmp_path.iterdir()) == [made.parent]


def test_the_page_names_tests_that_are_there():
    page = (ROOT / report.PAGE).read_text("utf-8")
    named = set(re.findall(r"`(test_\w+)`", page))
    assert len(named) >= 10
    there = set(
        re.findall(r"^def (test_\w+)", (ROOT / "tests/in_vllm/test_vllm.py").read_text(), re.M)
    )
    assert named <= there


def test_the_page_is_what_the_results_give():
    assert report.main(["--check"]) == 0
