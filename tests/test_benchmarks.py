"""The benchmark runs, counts, merges and refuses as documented."""

import json
import re
import subprocess
from dataclasses import replace

import pytest
import torch
from benchmark_support import HANDED_IN, TREES, command, environment, synthetic

from benchmarks import compare, host, report, run, timing
from benchmarks import environment as environments
from benchmarks.cases import GROUPS, HOST_CASE, Case
from benchmarks.cases import quick as quick_cases
from benchmarks.operands import make_operands, vary
from benchmarks.results import KEY, Results
from benchmarks.triad import triad_buffers
from merge_attn_states import selected_kernel
from merge_attn_states._library import OP_LIBRARY

CPU = torch.device("cpu")


@pytest.fixture
def no_git(monkeypatch):
    """As on a machine that got the sources without their history."""
    monkeypatch.setattr(environments, "git", lambda *arguments: None)


def quick(output, *arguments):
    common = ["--quick", "--device", "cpu", "--rounds", "1", "--output", str(output), "--dirty"]
    return run.main([*common, "--source-trees", HANDED_IN, *arguments])


def test_quick_run_in_pieces(no_git, tmp_path, capsys):
    file = tmp_path / "results.json"
    groups = ["small", "context", "empties", "layouts", "cpu", "host"]
    assert quick(file, "--only", *groups) == 0
    before = Results.load(file)
    assert list(before.runs) == groups
    assert {record["group"] for record in before.records} == set(groups)
    for record in before.records:
        if record["provider"].startswith("ours"):
            assert record["low_us"] <= record["median_us"] <= record["high_us"]
        assert record.get("status") in (None, "not supported")
    in_place = {r["case"].partition(", ")[2] for r in before.select("context")}
    assert {name.count("output_lse elsewhere") for name in in_place} == {0, 1}
    assert "ours_keyword" in {record["provider"] for record in before.select("host")}
    table = capsys.readouterr().out
    assert "half the prefix empty cold" in table
    assert "merge_attn_states, by keyword" in table

    assert quick(file, "--only", "small") == 0  # replaces its group and leaves the others
    after = Results.load(file)
    others = [record for record in before.records if record["group"] != "small"]
    assert [record for record in after.records if record["group"] != "small"] == others
    assert len(after.select("small")) == len(before.select("small"))
    assert after.select("small") != before.select("small")

    with pytest.raises(SystemExit, match="--quick, which measures nothing"):
        report.load([file])


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        (
            {"gpu": "NVIDIA H200"},
            "gpu is 'NVIDIA H200' now and 'NVIDIA H100 80GB HBM3' in the file",
        ),
        ({"trees": {**TREES, "csrc": "0" * 40}}, "trees is"),
        ({"torch": "2.12.0"}, "torch is"),
        ({"driver": "575.00"}, "driver is"),
        ({"vllm": "0.34.0"}, "vllm is '0.34.0' now and '0.33.0' in the file"),
        ({"dirty": True}, "dirty is"),
        ({"quick": True}, "quick is"),
        ({"vllm": None, "flashinfer": None}, ""),  # a piece that was measured without them
        ({}, ""),
    ],
)
def test_merge_refusals(changed, said):
    refusal = synthetic("H100").refuses(environment("H100", **changed), {})
    assert refusal.startswith(said)
    assert bool(refusal) == bool(said)


def test_groups_of_another_processor_are_refused(no_git, tmp_path, monkeypatch):
    file = tmp_path / "results.json"
    assert quick(file, "--only", "cpu") == 0
    monkeypatch.setattr(environments, "cpu_name", lambda: "another processor")
    with pytest.raises(SystemExit, match=r"cpu is 'another processor' now and .* in the file's"):
        quick(file, "--only", "host")


def test_refusal_leaves_the_file(no_git, tmp_path):
    file = tmp_path / "results.json"
    synthetic("H100").save(file)
    before = file.read_bytes()
    with pytest.raises(SystemExit, match="holds other results: gpu is None now"):
        quick(file, "--only", "small")
    assert file.read_bytes() == before


def test_results_survive_the_file(tmp_path):
    results = synthetic("H200")
    results.save(tmp_path / "h200.json")
    loaded = Results.load(tmp_path / "h200.json")
    for name in ("environment", "runs", "records"):
        assert getattr(loaded, name) == getattr(results, name)
    text = (tmp_path / "h200.json").read_text()
    (tmp_path / "h200.json").write_text(text.replace('"schema": 1', '"schema": 0'))
    with pytest.raises(SystemExit, match="expected schema 1, got 0"):
        Results.load(tmp_path / "h200.json")


def test_cases_that_must_be_there():
    named = {group: {case.name for one in GROUPS[group] for case in one} for group in GROUPS}
    shapes = "1024x16x128 2048x16x128 8192x16x128 8192x128x128 8192x64x64 2048x32x64 2048x16x96"
    sweep = {f"{shape} bf16" for shape in f"{shapes} 1024x16x192 2048x16x576".split()}
    sizes = (32, 48, 64, 80, 96, 112, 128, 192, 256, 512)
    sweep |= {f"4096x32x{head_size} bf16" for head_size in sizes}
    assert sweep <= named["sweep"]
    assert {case.regime for one in GROUPS["sweep"] for case in one} == {"cold"}
    assert {case.dtype for one in GROUPS["sweep"] for case in one} > {"float16", "float32"}
    warm = "1024x16x128 2048x16x128 2048x32x64 1024x16x256 512x16x512 2048x16x96 1024x16x192"
    assert {f"{shape} bf16" for shape in warm.split()} <= named["warm"]


def test_every_record_has_a_key_of_its_own():
    results = synthetic()
    keys = [tuple(record[field] for field in KEY) for record in results.records]
    assert len(set(keys)) == len(keys)


@pytest.mark.parametrize(
    ("case", "moved"),
    [
        # [N, H, D] = 1024x16x128 has 2,097,152 elements and [H, N] 16,384.
        (Case(1024, 16, 128), 3 * 2 * 2_097_152 + 3 * 4 * 16_384),
        (Case(1024, 16, 128, "float32"), 3 * 4 * 2_097_152 + 3 * 4 * 16_384),
        (Case(1024, 16, 128, output_dtype="float8_e4m3fn"), 5 * 2_097_152 + 3 * 4 * 16_384),
        # Half of the tokens: three rows and LSEs each; the other half: two, none, the LSEs alone.
        (Case(1024, 16, 128, context_tokens=512), 5 * 2_097_152 + 5 * 2 * 16_384),
        (Case(1024, 16, 128, context_tokens=512, in_place=True), 3 * 2_097_152 + 3 * 2 * 16_384),
        (
            Case(1024, 16, 128, context_tokens=512, in_place=True, lse_elsewhere=True),
            3 * 2_097_152 + 5 * 2 * 16_384,
        ),
    ],
    ids=lambda value: value.name if isinstance(value, Case) else "",
)
def test_bytes(case, moved):
    assert case.bytes == moved
    narrow = bool(case.output_dtype)
    sets = triad_buffers(case.bytes, narrow, 3, CPU)
    for buffers in sets:
        assert abs(sum(buffer.numel() for buffer in buffers) - moved) <= 24
    memory = [buffer.data_ptr() for buffers in sets for buffer in buffers]
    assert len(set(memory)) == 9


def test_in_place_is_where_it_says():
    case = Case(8, 2, 16, context_tokens=4, in_place=True)
    shared = make_operands(replace(case, in_place=False, context_tokens=None), 1, CPU)[0]
    inside, beside = vary(shared, case), vary(shared, replace(case, lse_elsewhere=True))
    assert inside.output is beside.output is shared.suffix_output
    assert inside.output_lse is shared.suffix_lse
    assert beside.output_lse is shared.output_lse
    assert inside.prefill_tokens_with_context == 4


@pytest.mark.parametrize("bytes_a_set", [100_000, 26_000_000, 99_999_999, 800_000_000])
def test_cold_buffers_exceed_twice_the_l2(bytes_a_set, monkeypatch):
    l2 = 50_000_000
    properties = type("Properties", (), {"L2_cache_size": l2})
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device: properties)
    sets = timing.buffer_sets(bytes_a_set, torch.device("cuda"))
    # When a set's turn comes again, the others have moved more than twice the L2 since.
    assert sets >= 2
    assert (sets - 1) * bytes_a_set >= 2 * l2


def test_everyone_is_first_in_turn():
    turns = [names for _, names in timing._turns(["a", "b", "c"], 6)]
    assert [names[0] for names in turns] == ["a", "b", "c", "a", "b", "c"]
    assert {tuple(sorted(names)) for names in turns} == {("a", "b", "c")}


def test_a_bare_launch_is_as_large_as_ours(cuda):
    operands = make_operands(HOST_CASE, 1, torch.device(cuda))[0]
    variant = selected_kernel(*operands[:6]).variant
    tokens, heads, threads = map(int, re.findall(r"\d+", variant))
    blocks = -(-HOST_CASE.tokens // tokens) * -(-HOST_CASE.heads // heads)
    assert (blocks, threads) == (host.BLOCKS, host.THREADS)


def test_whose_answer_is_wrong_is_not_timed_on_the_host(monkeypatch):
    assert set(host._timed_calls(CPU, {})) == {"ours", "ours_keyword", "ours_ops", "add"}
    keyword = f"merge({host.KEYWORDS}, prefill_tokens_with_context=1)"
    monkeypatch.setattr(host, "statements", lambda *_: {"ours_keyword": keyword})
    with pytest.raises(SystemExit, match=r"^ours_keyword: merge.*not close"):
        host._timed_calls(CPU, {})


def test_the_commands(tmp_path):
    """As people call them, each in a process."""
    status, said = command("--device", "cpu", "--only", "cpu", "--quick", "--rounds", "1")
    assert status == 0, said
    assert "8x4x64 fp32 cpu" in said
    results = synthetic("H100")
    results.environment["quick"] = True
    results.save(tmp_path / "h100.json")
    status, said = command("targets", str(tmp_path / "h100.json"))
    assert "of the triad, cold, 12 MB and more" in said
    status, said = command("report", str(tmp_path / "h100.json"))
    assert status == 1
    assert "is of --quick, which measures nothing" in said


COMPARED = ["--only", "cpu", "--device", "cpu", "--quick", "--rounds", "1", "--turns", "1"]


def test_two_op_libraries_side_by_side(capsys):
    libraries = [str(OP_LIBRARY)] * 2
    assert compare.main([*libraries, *COMPARED]) == 0
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.split().count("limit") == 2
    assert len(rows) == len(quick_cases(GROUPS["cpu"]))
    assert rows[0].startswith("cpu: 8x4x128 fp32 cpu ")


def test_one_op_library_is_not_compared(capsys):
    with pytest.raises(SystemExit):
        compare.main([str(OP_LIBRARY)])
    assert "expected two op libraries or more" in capsys.readouterr().err


def test_the_op_library_that_is_named_is_the_one_measured(tmp_path):
    """A file that is none: its process fails."""
    broken = tmp_path / "broken.so"
    broken.write_text("no library")
    status, said = command("compare", str(OP_LIBRARY), str(broken), *COMPARED)
    assert status != 0
    assert "cannot be loaded" in said


def test_best_of_three_processes(monkeypatch):
    medians = iter([(5.0, 7.5), (4.0, 7.0), (4.5, 6.5)])

    def process(command, **_):
        ours, add = next(medians)
        times = {"ours": (ours, ours - 1, ours + 1), "add": (add, add - 1, add + 1)}
        return subprocess.CompletedProcess(command, 0, json.dumps({"tight": times, "swept": times}))

    monkeypatch.setattr(subprocess, "run", process)
    records = host.measure_host(CPU, {}, None, quick=False)
    best = {(r["regime"], r["provider"]): r for r in records}
    assert len(best) == 4
    ours, add = best["tight", "ours"], best["swept", "add"]
    assert (ours["median_us"], ours["low_us"], ours["high_us"]) == (4, 3, 5)
    assert ours["processes"] == [5, 4, 4.5]
    assert add["median_us"] == 6.5
