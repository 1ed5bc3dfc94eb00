"""The benchmark runs, counts and refuses as documented, and what is published is what it gave."""

import json
import shutil
import subprocess
from dataclasses import replace

import pytest
import torch
from benchmark_support import ROOT, TREES, environment, synthetic

from benchmarks import check, host, report, run, timing, vllm
from benchmarks import environment as environments
from benchmarks.cases import ALL_GROUPS, GROUPS, Case
from benchmarks.measure import measure
from benchmarks.operands import Operands, make_operands, vary
from benchmarks.picture_rows import ROWS, description
from benchmarks.pictures import save
from benchmarks.providers import Bound, Provider, providers
from benchmarks.results import KEY, Results
from benchmarks.sections import NO_RESULTS
from benchmarks.targets import outcomes
from benchmarks.triad import triad_buffers
from merge_attn_states.reference import merge_attn_states_reference

CPU = torch.device("cpu")
HANDED_IN = f"csrc={TREES['csrc']},python={TREES['python']},commit={'e' * 40}"
PUBLISHED = sorted(report.RESULTS.glob("*.json"))


# Running it.


@pytest.fixture
def no_git(monkeypatch):
    """As on a machine that got the sources without their history."""
    monkeypatch.setattr(environments, "git", lambda *arguments: None)
    monkeypatch.setattr(report, "git", lambda *arguments: None)


def quick(output, *arguments):
    common = ["--quick", "--device", "cpu", "--rounds", "1", "--output", str(output)]
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


def test_without_git_the_hashes_are_asked_for(no_git, tmp_path):
    with pytest.raises(SystemExit, match="must be handed in"):
        run.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "results.json")])
    with pytest.raises(SystemExit, match="expected csrc=HASH,python=HASH,commit=HASH"):
        environments.source_trees("csrc=1")


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
    refusal = synthetic("H100").refuses(environment("H100", **changed))
    assert refusal.startswith(said)
    assert bool(refusal) == bool(said)


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


# What is measured.


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


# Who is measured.


TODAY = """merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output,
    Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse,
    int? prefill_tokens_with_context, Tensor? output_scale=None) -> ()"""
OLDER = """merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output,
    Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse) -> ()"""


@pytest.fixture
def vllm_op():
    """Registers an op in the place of vLLM's, of a given schema, that computes `answer`."""
    if hasattr(torch.ops._C, "merge_attn_states"):
        pytest.skip("vLLM's own op is registered in this process")
    library = torch.library.Library("_C", "FRAGMENT")

    def register(schema, error=0.0):
        def op(output, output_lse, prefix_output, prefix_lse, suffix_output, suffix_lse, *more):
            parts = (prefix_output, prefix_lse, suffix_output, suffix_lse)
            merged, lse = merge_attn_states_reference(*parts, *more)
            output.copy_(merged + error)
            output_lse.copy_(lse)

        library.define(schema)
        library.impl("merge_attn_states", op, "CompositeExplicitAutograd")

    yield register
    library._destroy()
    if "merge_attn_states" in vars(torch.ops._C):
        delattr(torch.ops._C, "merge_attn_states")


def measured_on_cpu(case):
    chosen = [one for one in providers({}) if one.name in ("ours", "vllm")]
    records = measure("small", (case,), chosen, CPU, rounds=1)
    return {record["provider"]: record for record in records}


@pytest.mark.parametrize("schema", [TODAY, OLDER], ids=["today", "older"])
def test_vllm_arguments_by_schema(schema, vllm_op):
    vllm_op(schema)
    names = vllm.argument_names()
    assert names[:3] == ["output", "output_lse", "prefix_output"]
    operands = Operands(*"abcdef", 7, "h")
    assert vllm.arguments(operands) == tuple("afbcde") + (7, "h")[: len(names) - 6]
    assert (vllm.dispatcher() is None) == (schema is OLDER)

    records = measured_on_cpu(Case(8, 2, 16))
    assert records["vllm"]["median_us"] > 0
    with_context = measured_on_cpu(Case(8, 2, 16, context_tokens=3))["vllm"]
    if schema is OLDER:
        assert with_context["status"] == "not supported"
        assert with_context["reason"] == "this release has no prefill_tokens_with_context"
    else:
        assert with_context["median_us"] > 0
    odd = measured_on_cpu(Case(8, 2, 20))["vllm"]
    assert odd["reason"] == "head size 20 is no multiple of 16 bytes"


def test_a_wrong_answer_is_reported_and_not_timed(vllm_op, tmp_path):
    vllm_op(TODAY, error=0.1)
    records = measured_on_cpu(Case(8, 2, 16))
    assert records["vllm"]["status"] == "wrong"
    assert "median_us" not in records["vllm"]
    assert records["ours"]["median_us"] > 0
    results = Results(environment("H100"))
    results.add("small", results.environment, {}, list(records.values()))
    assert results.speed_up(records["ours"], "vllm") is None
    assert run.report_failures(results, ["small"]) == 0  # another's mistake
    records["ours"] |= {"status": "wrong", "reason": "for the test"}
    assert run.report_failures(results, ["small"]) == 1


def test_a_provider_that_raises_is_reported():
    def bind(operands):
        raise RuntimeError("no such kernel\nand more")

    broken = Provider("flashinfer", lambda case, operands: "", bind)
    record = measure("small", (Case(8, 2, 16),), [broken], CPU, rounds=1)[0]
    assert (record["status"], record["reason"]) == ("failed", "RuntimeError: no such kernel")


WRONG = {
    "nothing": lambda o: None,
    "NaN in one row past the sample": lambda o: o.output[1].fill_(torch.nan),
    "NaN in one LSE past the sample": lambda o: o.output_lse[0, 1].fill_(torch.nan),
    "LSE of the maximum": lambda o: torch.maximum(o.prefix_lse, o.suffix_lse, out=o.output_lse),
    "a row off by a percent": lambda o: o.output[0].mul_(1.01).add_(0.01),
    "suffix alone": lambda o: o.output.copy_(o.suffix_output),
}


@pytest.mark.parametrize("how", WRONG)
def test_check_sees(how):
    case = Case(200, 2, 16, "float32")  # more tokens than are compared: the 2nd is searched only
    operands = make_operands(case, 1, CPU)[0]
    right, mistake = providers({})[0].bind(operands), WRONG[how]

    def call():
        if how != "nothing":
            right.call()
        mistake(operands)

    assert check.check(right, operands) == ""
    assert check.check(Bound(call, right.answer), operands) != ""


@pytest.mark.parametrize("lse_elsewhere", [False, True])
def test_check_in_place(lse_elsewhere):
    case = Case(8, 2, 16, context_tokens=4, in_place=True, lse_elsewhere=lse_elsewhere)
    shared = make_operands(replace(case, in_place=False, context_tokens=None), 1, CPU)[0]
    operands = vary(shared, case)
    bound = providers({})[0].bind(operands)
    assert check.check(bound, operands) == ""
    assert check.check(Bound(lambda: None, bound.answer), operands) != ""


# Targets.


def outcome_of(results, text):
    return next(one for one in outcomes(results) if one.text == text)


def scale(results, factor, **chosen):
    found = [r for r in results.records if all(r.get(k) == v for k, v in chosen.items())]
    assert found
    for record in found:
        for name in ("median_us", "low_us", "high_us"):
            record[name] *= factor


@pytest.mark.parametrize("gpu", ["H100", "H200"])
def test_targets_met_and_missed(gpu):
    results = synthetic(gpu)
    asked = {one.text: one for one in outcomes(results)}
    assert all(one.met is not None for one in asked.values())

    warm = "vLLM's time over ours, warm, 25 MB"
    scale(results, 0.5, group="warm", provider="ours", case="2048x16x128 bf16")
    assert outcome_of(results, warm).met is True
    scale(results, 3, group="warm", provider="ours", case="2048x16x128 bf16")
    missed = outcome_of(results, warm)
    assert missed.met is False
    assert missed.case == "2048x16x128 bf16 warm"
    assert missed.measured == pytest.approx(asked[warm].measured / 1.5)

    # Where less is better, the largest is the worst; either way of calling counts.
    bare = "eager call, us above a bare launch"
    assert outcome_of(results, bare).asked == {"H100": "<= 1.5", "H200": "<= 1"}[gpu]
    scale(results, 0.8, group="host", provider="ours")
    keyword, floor = (
        results.us(results.find("host", "4x8x128 bf16", "tight", provider))
        for provider in ("ours_keyword", "bare_launch")
    )
    assert outcome_of(results, bare).measured == keyword - floor
    scale(results, 2, group="host", provider="ours_keyword")
    assert outcome_of(results, bare).met is False


def test_a_target_is_as_good_as_its_worst_case():
    results = synthetic("H100")
    text = "of the triad, cold, 12 MB and more"
    for record in results.select("sweep", lambda r: r["provider"] == "ours"):
        factor = results.of_limit(record) / 1.2
        scale(results, factor, group="sweep", provider="ours", case=record["case"])
    assert outcome_of(results, text).met is True
    scale(results, 2, group="sweep", provider="ours", case="4096x32x80 bf16")
    worst = outcome_of(results, text)
    assert (worst.met, worst.case) == (False, "4096x32x80 bf16 cold")
    assert worst.measured == pytest.approx(0.6)
    record = results.find("sweep", "4096x32x80 bf16", "cold", "ours")
    for name in ("median_us", "low_us", "high_us"):
        del record[name]
    record |= {"status": "wrong", "reason": "for the test"}
    wrong = outcome_of(results, text)
    assert (wrong.met, wrong.case) == (False, "4096x32x80 bf16 cold: wrong")


def test_what_was_not_measured_is_neither_met_nor_missed():
    results = synthetic("H100")
    results.add("layouts", results.environment, {}, [])
    one = outcome_of(results, "generic, FP8 inputs")
    assert (one.met, one.measured, one.case) == (None, None, "not measured")
    assert [one.text for one in outcomes(Results(environment("Another GPU")))] == [
        one.text for one in outcomes(results) if one.text.startswith("CPU")
    ]


# What is published.


@pytest.fixture
def root(tmp_path):
    """README.md and docs/benchmarks.md, alone."""
    (tmp_path / "docs").mkdir()
    for name in report.SECTIONS:
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def section(root, name):
    return (root / name).read_text("utf-8").partition(report.BEGIN)[2].partition(report.END)[0]


def test_report(root, capsys):
    pytest.importorskip("matplotlib")
    results = {gpu: synthetic(gpu) for gpu in ("H100", "H200")}
    scale(results["H100"], 0.5, group="sweep", provider="vllm", case="8192x16x128 bf16")
    files = [str(root / f"{gpu.lower()}.json") for gpu in results]
    for file, one in zip(files, results.values(), strict=True):
        one.save(root / file)
    there = ["--root", str(root)]
    assert report.main([*files, *there]) == 0
    assert report.main([*files, *there, "--check"]) == 0

    readme, docs = section(root, "README.md"), section(root, "docs/benchmarks.md")
    assert "NVIDIA H200" in readme
    assert "commit eeeeeeeeee (csrc cccccccccc, python dddddddddd)" in readme
    loss = results["H100"].find("sweep", "8192x16x128 bf16", "cold", "ours")
    speed_up = results["H100"].speed_up(loss, "vllm")
    assert speed_up < 0.6
    assert f"{speed_up:.2f}x | " in readme  # in its line, and by name among all cases
    assert f"from {speed_up:.2f}x (8192x16x128 bf16 cold)" in readme
    assert "| **missed** |" in docs
    assert docs.count("<details>") == 2 * (len(ALL_GROUPS) - 1)
    for one in results.values():
        assert all(record["case"] in docs for record in one.records)

    for name in ROWS:
        for suffix in ("svg", "png"):
            path = root / "docs" / "benchmarks" / f"{name}.{suffix}"
            assert report.embedded(path) == description(list(ROWS[name](list(results.values()))))
    assert f"H100\tcold\t{speed_up:.3f}" in report.embedded(root / "docs" / "benchmarks/vllm.svg")

    # Other results: everything is seen to differ, and a lost picture too.
    scale(results["H200"], 1.5, provider="ours")
    results["H200"].save(root / files[1])
    (root / "docs" / "benchmarks" / "host.png").unlink()
    capsys.readouterr()
    assert report.main([*files, *there, "--check"]) == 1
    said = capsys.readouterr().out
    for name in ("README.md", "docs/benchmarks.md", "limit.svg", "limit.png", "vllm.svg"):
        assert name in said
    assert "host.png is missing" in said

    # Without results nothing is left of them.
    assert [*report.publish([], root)] == [root / name for name in report.SECTIONS]
    assert section(root, "README.md").strip() == NO_RESULTS
    assert list((root / "docs" / "benchmarks").iterdir()) == []
    assert list(report.differences([], root)) == []


def test_report_of_one_unknown_gpu_measured_in_part(root):
    results = synthetic("Some GPU")
    for group in ("sweep", "warm", "models", "cpu", "host"):
        results.add(group, results.environment, results.runs[group], [])
        del results.runs[group]
    text = report.SECTIONS["README.md"]([results])
    assert "| 256x16x128 | cold | 3.2 |" in text
    assert "8192x16x128 | cold" not in text
    assert list(ROWS["host"]([results])) == []
    assert "<details><summary>small" in report.SECTIONS["docs/benchmarks.md"]([results])


def test_pictures_are_the_same_each_time(tmp_path):
    pytest.importorskip("matplotlib")
    machines = [synthetic("H100")]
    for name in ("limit", "host"):
        rows = list(ROWS[name](machines))
        first, again = tmp_path / "first", tmp_path / "again"
        for folder in (first, again):
            folder.mkdir(exist_ok=True)
            save(name, rows, folder)
        for suffix in ("svg", "png"):
            written = [(folder / f"{name}.{suffix}").read_bytes() for folder in (first, again)]
            assert written[0] == written[1]
        assert b"<dc:date>" not in (first / f"{name}.svg").read_bytes()


def test_a_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="page lacks the markers"):
        report.replaced("# Title\n", "section", "page")
    text = report.replaced(f"a\n{report.BEGIN}old{report.END}\nb\n", "new", "page")
    assert text == f"a\n{report.BEGIN}\nnew\n\n{report.END}\nb\n"


def test_published_is_what_the_results_give():
    found = list(report.differences(report.load(PUBLISHED), ROOT))
    assert found == [], "python -m benchmarks report"


@pytest.mark.parametrize("path", PUBLISHED or [None], ids=lambda path: path.name if path else "")
def test_published_results_are_of_this_checkout(path):
    if path is None:
        pytest.skip("no results are published")
    try:
        difference = report.stale(Results.load(path))
    except LookupError as reason:
        pytest.skip(f"{path.name}: {reason}")
    if difference:  # no failure: figures may be older than the last change, but not unnoticed
        pytest.skip(f"{path.name} is of other sources: {difference}")


def test_stale_results_are_noticed(monkeypatch):
    here = {"HEAD:csrc": "1" * 40, "HEAD:python": TREES["python"]}
    monkeypatch.setattr(report, "git", lambda _, tree: here[tree])
    said = report.stale(synthetic("H100"))
    assert said == "csrc is 1111111111 here, cccccccccc was measured"
    here["HEAD:csrc"] = TREES["csrc"]
    assert report.stale(synthetic("H100")) == ""
    here["HEAD:csrc"] = None
    with pytest.raises(LookupError):
        report.stale(synthetic("H100"))
