"""Targets, tables and pictures follow from the results, and what is published is what they give."""

import shutil

import pytest
from benchmark_support import ROOT, TREES, environment, synthetic

from benchmarks import report
from benchmarks.cases import ALL_GROUPS
from benchmarks.picture_rows import ROWS, description
from benchmarks.pictures import save
from benchmarks.results import Results
from benchmarks.sections import NO_RESULTS
from benchmarks.targets import outcomes

PUBLISHED = sorted(report.RESULTS.glob("*.json"))
EVERY_FILE = sorted(report.RESULTS.rglob("*.json"))


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

    warm = "vLLM's time over ours, warm, 25 MB (2048x16x128 bf16)"
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
    assert "measured with other sources" not in readme + docs
    results["H200"].environment["trees"]["csrc"] = "f" * 40
    for text in report.SECTIONS.values():
        assert "\nH200: measured with other sources than H100.\n" in text([*results.values()])
    results["H200"].environment["trees"]["csrc"] = TREES["csrc"]
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
    docs = report.SECTIONS["docs/benchmarks.md"]([results])
    assert "<details><summary>small" in docs
    assert "](benchmarks/limit.svg)" in docs
    assert "host.svg" not in docs  # nothing of it was measured


def test_gpus_by_the_name_that_people_say():
    named = {name: Results(environment(name)).gpu for name in ("NVIDIA GH200 480GB", "H200", None)}
    assert named == {"NVIDIA GH200 480GB": "NVIDIA GH200 480GB", "H200": "H200", None: "CPU"}


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


@pytest.mark.parametrize("path", EVERY_FILE or [None], ids=lambda path: path.name if path else "")
def test_published_results_are_of_this_checkout(path):
    if path is None:
        pytest.skip("no results are published")
    if difference := report.stale(Results.load(path)):
        # No failure: figures may be older than the last change, but not unnoticed.
        pytest.skip(f"{path.name} is of other sources: {difference}")


def test_stale_results_are_noticed(monkeypatch):
    here = {"csrc": "1" * 40, "python": TREES["python"]}
    monkeypatch.setattr(report, "tree_hash", lambda folder: here[folder.name])
    said = report.stale(synthetic("H100"))
    assert said == "csrc is 1111111111 here, cccccccccc was measured"
    here["csrc"] = TREES["csrc"]
    assert report.stale(synthetic("H100")) == ""
