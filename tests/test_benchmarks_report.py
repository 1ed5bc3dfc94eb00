"""Targets and pages follow from the results, and what is published is what they give."""

import shutil
from xml.etree import ElementTree

import pytest
from benchmark_support import environment_of, spread, synthetic, synthetic_ranks

from benchmarks import environment, report, tables
from benchmarks.environment import ROOT
from benchmarks.results import Results
from benchmarks.targets import TARGETS, targets_table

PUBLISHED = sorted(report.RESULTS.rglob("*.json"))
OURS_64 = "between neighbours, added time over the limit's: bf16 and fp16, D = 128, 64x16"
VLLM_64 = "between neighbours, vLLM's added time over ours: bf16 and fp16, D = 128, 64x16"


def outcome(results, text):
    """What was asked and measured, the verdict and the worst case."""
    return next(row[1:] for row in targets_table(results)[1] if row[0] == text)


def put(results, provider, us, group="neighbours", **fields):
    found = results.select(group, **fields)
    assert found
    for record in found:
        record["us"][provider] = spread(us)


def test_a_target_is_as_good_as_its_worst_case():
    results = synthetic()
    size = {"size": "64x16", "kind": "contiguous", "head_size": 128}
    put(results, "limit", 2.0, **size)
    put(results, "ours", 2.4, **size)
    assert outcome(results, OURS_64)[:3] == ["<= 1.24", "1.200", "met"]
    put(results, "ours", 2.52, dtype="float16", **size)  # 0.04 us above it
    assert outcome(results, OURS_64)[1:] == ["1.260", "within noise", "64x16x128 fp16"]
    put(results, "ours", 2.6, dtype="bfloat16", **size)
    assert outcome(results, OURS_64)[1:] == ["1.300", "missed", "64x16x128 bf16"]
    put(results, "ours", 1.9, **size)
    assert outcome(results, OURS_64)[1:3] == [tables.AT_THE_LIMIT, "met"]

    put(results, "ours", 2.0, **size)
    put(results, "vllm", 2.36, **size)
    assert outcome(results, VLLM_64)[:3] == [">= 1.18", "1.180", "met"]
    put(results, "vllm", 2.32, dtype="float16", **size)  # 1.19 of 1.95
    assert outcome(results, VLLM_64)[1:] == ["1.160", "within noise", "64x16x128 fp16"]
    put(results, "vllm", 2.2, dtype="bfloat16", **size)
    assert outcome(results, VLLM_64)[1:] == ["1.100", "missed", "64x16x128 bf16"]


def test_other_layouts_are_compared_with_the_contiguous_case():
    results = synthetic()
    above = "between neighbours, other layouts: us above contiguous, up to 3.2 MB, 64x16"
    over = "between neighbours, other layouts: time over contiguous, above 3.2 MB, 2048x16"
    bf16 = {"dtype": "bfloat16", "head_size": 128}
    for size, contiguous, other in (("64x16", 2.0, 2.1), ("2048x16", 6.0, 6.1)):
        put(results, "ours", other, size=size, **bf16)
        put(results, "ours", contiguous, size=size, kind="contiguous", **bf16)
    assert outcome(results, above)[1:3] == ["0.100", "met"]
    assert outcome(results, over)[1:3] == ["1.017", "met"]
    put(results, "ours", 6.5, size="2048x16", kind="row-strided LSE")
    assert outcome(results, over)[1:] == ["1.083", "missed", "2048x16x128 bf16, row-strided LSE"]


def test_half_a_ring_is_compared_with_its_whole_step():
    results = synthetic()
    text = "half of a ring's rows (zigzag): time over the whole step's"
    for size in ("4608x24", "32768x10"):
        put(results, "ours", 100.0, "states", kind="ring step", regime="cold", size=size)
        put(results, "ours", 51.0, "states", kind="zigzag half", size=size)
    assert outcome(results, text)[:3] == ["<= 0.525", "0.510", "met"]
    put(results, "ours", 54.0, "states", kind="zigzag half", size="32768x10")
    assert outcome(results, text)[1:] == ["0.540", "missed", "32768x10x128 bf16, zigzag half"]


def test_on_the_host_either_way_of_calling_counts():
    results = synthetic()
    text = "eager call in inference mode, tight: time over torch.add(out=)"
    put(results, "ours_keyword", 5.6, "host", mode="inference mode", regime="tight")
    case = "inference mode, tight, ours_keyword"
    assert outcome(results, text) == ["<= 0.78", "1.000", "missed", case]


def test_a_wrong_answer_misses_and_what_was_not_measured_does_neither():
    results = synthetic()
    text = "cold, FP8 output: of the limit's bytes a second"
    (record, *_) = results.select("cold", kind="FP8 output")
    del record["us"]["ours"]
    record["refused"]["ours"] = "wrong: NaN in the output"
    said = "2048x16x128 bf16, FP8 output: wrong: NaN in the output"
    assert outcome(results, text) == [">= 0.95", "-", "missed", said]
    results.add("cold", {}, [])
    assert outcome(results, text)[1:] == ["-", "-", "not measured"]
    other = targets_table(Results(environment_of("Another GPU")))[1]
    assert {row[0].partition(",")[0] for row in other} == {"CPU"}


def test_every_target_is_about_something():
    machines = synthetic(), synthetic_ranks()
    rows = {row[0]: row for results in machines for row in targets_table(results)[1]}
    assert len(rows) == sum(len(t.get("at_most", t.get("at_least")))
                            if isinstance(t.get("at_most", t.get("at_least")), dict) else 1
                            for t in TARGETS)  # fmt: skip
    assert [row for row in rows.values() if row[3] == "-"] == []


# What is published.


@pytest.fixture
def root(tmp_path):
    """README.md and docs/benchmarks.md, alone."""
    (tmp_path / "docs").mkdir()
    for name in ("README.md", "docs/benchmarks.md"):
        shutil.copy(ROOT / name, tmp_path / name)
    return tmp_path


def section(root, name):
    return (root / name).read_text("utf-8").partition(report.BEGIN)[2].partition(report.END)[0]


def words_of(picture):
    drawn = ElementTree.parse(picture)
    return {text.text for text in drawn.iter("{http://www.w3.org/2000/svg}text")}


def test_report(root, capsys):
    results = {"h100": synthetic(), "h200": synthetic("NVIDIA H200")}
    size = {"size": "2048x16", "kind": "contiguous", "head_size": 128, "dtype": "bfloat16"}
    put(results["h100"], "ours", 7.0, **size)
    put(results["h100"], "limit", 8.0, **size)
    put(results["h100"], "vllm", 6.0, **size)
    files = [str(root / f"{name}.json") for name in results]
    for file, one in zip(files, results.values(), strict=True):
        one.save(root / file)
        assert vars(Results.load(root / file)) == vars(one)
    there = ["--root", str(root)]
    assert report.main([*files, *there]) == 0
    assert report.main([*files, *there, "--check"]) == 0

    readme, docs = section(root, "README.md"), section(root, "docs/benchmarks.md")
    line = "| 2048x16x128 bf16 | 25.6 | 7.00 (6.86-7.21) | 8.00 (7.84-8.24) | at the limit |"
    assert f"{line} 6.00 (5.88-6.18) | 0.86x |" in readme  # nothing above it, and a loss is shown
    assert line in docs
    assert "NVIDIA H100 80GB HBM3 (SM 1980 MHz, memory 2619 MHz)" in readme
    assert "commit ffffffffff (csrc cccccccccc, include dddddddddd, python eeeeeeeeee)" in readme
    assert "H200" not in readme
    assert "### H200" in docs
    assert docs.count("<details>") == 10  # of each: neighbours, cold, both of states, cpu
    assert all(one["case"] in docs for one in results["h100"].records)
    assert "| not supported | - |" in docs  # what vLLM does not take
    assert {"7.00", "6.00", "2048 x 16"} <= words_of(root / "docs/benchmarks.svg")

    # Other results: everything is seen to differ.
    put(results["h100"], "ours", 9.0, **size)
    results["h100"].save(root / files[0])
    capsys.readouterr()
    assert report.main([*files, *there, "--check"]) == 1
    said = capsys.readouterr().out
    assert [name in said for name in ("README.md", "benchmarks.md", "benchmarks.svg")] == [True] * 3
    # Without results nothing is left of them.
    for path, text in report.pages([], root):
        assert report.NO_RESULTS in text if path.suffix == ".md" else text == ""


def test_report_of_many_parts(root):
    results = synthetic()
    ring = {"kind": "ring step", "regime": "cold", "size": "4608x24"}
    put(results, "ours", 50.0, "states", **ring)
    put(results, "limit", 49.0, "states", **ring)
    put(results, "eager", 210.0, "states", **ring)
    put(results, "compile", 45.0, "states", **ring)  # a loss is shown
    few = {"kind": "list", "size": "64x16", "parts": 8}
    put(results, "limit", 2.0, "states", **few)
    put(results, "ours", 2.2, "states", **few)
    put(results, "chain", 14.0, "states", **few)
    put(results, "flashinfer", 5.5, "states", **few)
    put(results, "eager", 15.0, "states", **few)
    del results.select("states", kind="list", size="64x16", parts=8)[0]["us"]["compile"]
    host = {"ours": spread(7.0), "eager": spread(40.0), "warm-up": spread(2e6)}
    results.select("states", regime="host")[0]["us"] = host
    file = root / "h100.json"
    results.save(file)
    assert report.main([str(file), "--root", str(root)]) == 0
    readme, docs = section(root, "README.md"), section(root, "docs/benchmarks.md")
    line = "| 4608x24x128 bf16, ring step | 143 | 50.0 (49.0-51.5) | 49.0 (48.0-50.5) | 0.980 |"
    assert f"{line} 4.20x | 0.90x |" in readme
    assert f"{line} - | - | 4.20x | 0.90x | 2 parts, 15 rows a block |" in docs
    line = "| 8 x 64x16x128 bf16, list | 2.40 | 2.20 (2.16-2.27) | 2.00 (1.96-2.06) | 1.10x |"
    assert f"{line} 6.36x | 2.50x | 6.82x | - | 8 parts, 15 rows a block |" in docs
    assert "| us a call at 64x8x128 | 64x8x128 bf16, ring step, host |" in docs
    assert "| update_state | 7.00 (6.86-7.21) |" in docs
    assert "| 4 x 1200x64x128 bf16, list | 99.8 |" in docs
    words = words_of(root / "docs/benchmarks-states.svg")
    assert {"2.20", "5.50", "15.0 (8x)", "8 parts", "ring step", "6x"} <= words
    assert "7x" not in words  # beyond it bars are cut


def test_report_of_an_unknown_gpu_measured_in_part(root):
    results = synthetic("Some GPU")
    for group in ("neighbours", "host", "cpu"):
        results.add(group, {}, [])
        del results.runs[group]
    readme, docs, drawn, many_drawn = (text for _, text in report.pages([results], root))
    assert report.NO_RESULTS in readme
    assert "### Some GPU" in docs
    assert "<details><summary>cold" in docs
    assert "<summary>neighbours" not in docs
    assert drawn == ""
    assert "<title>A ring's step and many parts, Some GPU: shorter" in many_drawn


def test_a_page_without_markers_is_refused():
    with pytest.raises(SystemExit, match="page lacks the markers"):
        report.replaced("# Title\n", "section", "page")
    text = report.replaced(f"a\n{report.BEGIN}old{report.END}\nb\n", "new", "page")
    assert text == f"a\n{report.BEGIN}\nnew\n\n{report.END}\nb\n"


def test_published_is_what_the_results_give():
    assert report.main(["--check"]) == 0, "python -m benchmarks report"


@pytest.mark.parametrize("path", PUBLISHED, ids=lambda path: path.name)
def test_published_results_are_of_this_checkout(path):
    results = Results.load(path)
    assert not results.environment["dirty"]
    if trees := environment.stale(results.environment):
        # No failure: figures may be older than the last change, but not unnoticed.
        pytest.skip(f"{path.name} was measured with another {' and '.join(trees)}")


def test_stale_results_are_noticed(monkeypatch):
    here = {"csrc": "1" * 40, "include": "d" * 40, "python": "e" * 40}
    monkeypatch.setattr(environment, "tree_hash", lambda folder: here[folder.name])
    assert environment.stale(synthetic().environment) == ["csrc"]
    here["csrc"] = "c" * 40
    assert environment.stale(synthetic().environment) == []
