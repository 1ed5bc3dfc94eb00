"""The benchmark runs, checks answers before it times them, and refuses as documented."""

import subprocess
from dataclasses import replace

import pytest
import torch
from benchmark_support import TREES, environment_of, stand_in_kernels, synthetic

import merge_attn_states
from benchmarks import check, cold, environment, neighbours, run, timing, vllm
from benchmarks.cases import GROUPS, Case, is_compared_with_pytorch
from benchmarks.operands import Operands, make_operands
from benchmarks.process import joined
from benchmarks.providers import EAGER, OURS, VLLM, Provider, prepare
from benchmarks.results import Results, ratio, time_of
from merge_attn_states.reference import merge_attn_states_reference

CPU = torch.device("cpu")
SMALL = Case(8, 2, 16)


# Answers.

WRONG = {
    "output not written": lambda o: o.output.fill_(torch.nan),
    "LSE not written": lambda o: o.output_lse.fill_(torch.nan),
    "NaN in one row past the sample": lambda o: o.output[1].fill_(torch.nan),
    "NaN in one LSE past the sample": lambda o: o.output_lse[0, 1].fill_(torch.nan),
    "LSE of the maximum": lambda o: torch.maximum(o.prefix_lse, o.suffix_lse, out=o.output_lse),
    "a row off by a percent": lambda o: o.output[0].mul_(1.01).add_(0.01),
    "suffix alone": lambda o: o.output.copy_(o.suffix_output),
}


@pytest.mark.parametrize("how", WRONG)
def test_a_wrong_answer_is_seen(how):
    # More tokens than are compared: the second is only searched for NaN.
    (operands,) = make_operands(Case(200, 2, 16, "float32"), 1, CPU)
    right = OURS.bind(operands)

    def call():
        right()
        WRONG[how](operands)

    assert check.check(right, operands) == ""
    assert check.check(call, operands) != ""


def test_an_answer_of_the_call_before_is_not_taken_for_this_ones():
    (operands,) = make_operands(SMALL, 1, CPU)
    OURS.bind(operands)()
    assert check.check(lambda: None, operands) == "NaN in the answer"


@pytest.mark.parametrize("kind", ["onto prefix", "onto suffix", "half context, onto suffix"])
def test_in_place_is_checked_too(kind):
    (operands,) = make_operands(replace(SMALL, kind=kind), 1, CPU)
    assert check.check(OURS.bind(operands), operands) == ""
    (operands,) = make_operands(replace(SMALL, kind=kind), 1, CPU)
    assert check.check(lambda: None, operands) != ""


def test_who_is_wrong_or_raises_is_not_timed():
    def raises(operands):
        raise RuntimeError("no such kernel\nand more")

    others = [Provider("wrong", lambda operands: operands.output.zero_), Provider("raises", raises)]
    timed, refused = prepare([OURS, *others], make_operands(SMALL, 2, CPU))
    assert set(timed) == {"ours"}
    assert len(timed["ours"]) == 2
    assert refused.pop("wrong").startswith("wrong: ")
    assert refused == {"raises": "failed: RuntimeError: no such kernel"}
    silent = Provider("silent", lambda operands: next(iter(())))
    assert prepare([silent], make_operands(SMALL, 1, CPU))[1] == {
        "silent": "failed: StopIteration: "
    }
    with pytest.raises(RuntimeError, match="no such kernel"):  # ours may not
        prepare([Provider("ours", raises)], make_operands(SMALL, 1, CPU))


TODAY = """merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output,
    Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse,
    int? prefill_tokens_with_context, Tensor? output_scale=None) -> ()"""
OLDER = """merge_attn_states(Tensor(a!) output, Tensor(b!)? output_lse, Tensor prefix_output,
    Tensor prefix_lse, Tensor suffix_output, Tensor suffix_lse) -> ()"""


@pytest.mark.parametrize("schema", [TODAY, OLDER], ids=["today", "older"])
def test_vllm_is_called_by_its_schema(schema):
    if hasattr(torch.ops._C, "merge_attn_states"):
        pytest.skip("vLLM's own op is registered in this process")

    def op(output, output_lse, *parts):
        merged, lse = merge_attn_states_reference(*parts)
        output.copy_(merged)
        output_lse.copy_(lse)

    library = torch.library.Library("_C", "FRAGMENT")
    library.define(schema)
    library.impl("merge_attn_states", op, "CompositeExplicitAutograd")
    try:
        operands = Operands(*"abcdef", 7, "h")
        names = vllm.argument_names()
        assert vllm.arguments(operands) == tuple("afbcde") + (7, "h")[: len(names) - 6]
        assert prepare([VLLM], make_operands(SMALL, 1, CPU))[1] == {}
        refused = {
            case: prepare([VLLM], make_operands(case, 1, CPU))[1].get("vllm", "")
            for case in (Case(8, 2, 20), Case(8, 2, 16, kind="half context"))
        }
        assert list(refused.values()) == [
            "not supported: head size 20 is no multiple of 16 bytes",
            "" if schema is TODAY
            else "not supported: this release has no prefill_tokens_with_context",
        ]  # fmt: skip
    finally:
        library._destroy()
        vars(torch.ops._C).pop("merge_attn_states", None)  # the namespace remembers it


# Cases and operands.


@pytest.mark.parametrize(
    ("kind", "moved"),
    [
        # [N, H, D] = 1024x16x128 has 2,097,152 elements and [H, N] 16,384.
        ("contiguous", 3 * 2 * 2_097_152 + 3 * 4 * 16_384),
        ("onto suffix", 3 * 2 * 2_097_152 + 3 * 4 * 16_384),
        ("FP8 output", 5 * 2_097_152 + 3 * 4 * 16_384),
        # Half of the tokens: three rows and LSEs each; the other half: two, none, the LSEs alone.
        ("half context", 5 * 2_097_152 + 5 * 2 * 16_384),
        ("half context, onto suffix", 3 * 2_097_152 + 3 * 2 * 16_384),
        ("half context, output onto suffix", 3 * 2_097_152 + 5 * 2 * 16_384),
    ],
)
def test_bytes(kind, moved):
    case = Case(1024, 16, 128, kind=kind)
    assert case.bytes() == moved
    assert case.bytes(lse=0) == moved - moved % 2_097_152


def test_kinds_are_what_they_say():
    made = {kind: make_operands(Case(8, 4, 16, kind=kind), 1, CPU)[0] for kind in KINDS}
    strides = {kind: one.prefix_output.stride() for kind, one in made.items()}
    assert strides["contiguous"] == made["padded heads"].output.stride() == (64, 16, 1)
    assert strides["padded heads"] == (96, 24, 1)
    assert strides["heads first"] == made["heads first"].output.stride() == (16, 128, 1)
    lse_strides = {kind: {one[i].stride() for i in (2, 4, 5)} for kind, one in made.items()}
    assert lse_strides["contiguous"] == {(8, 1)}
    assert lse_strides["row-strided LSE"] == {(72, 1)}
    assert lse_strides["tokens-first LSE"] == {(1, 4)}
    assert made["8-byte aligned"].prefix_output.data_ptr() % 16 == 8
    assert made["onto prefix"].output is made["onto prefix"].prefix_output
    elsewhere = made["half context, output onto suffix"]
    assert elsewhere.output is elsewhere.suffix_output
    assert elsewhere.output_lse is not elsewhere.suffix_lse
    assert elsewhere.prefill_tokens_with_context == 4
    assert made["half empty"].prefix_lse.isinf().sum() == 16
    with pytest.raises(ValueError, match=r"kind: expected one of .* got 'nonsense'"):
        Case(8, 4, 16, kind="nonsense")


KINDS = {case.kind for cases in GROUPS.values() for case in cases}


def test_a_size_is_as_many_bytes():
    plain = {c.size: c.bytes(lse=0) for c in GROUPS["neighbours"] if is_compared_with_pytorch(c)}
    assert len(plain) == 7
    for case in GROUPS["neighbours"]:
        if case.kind == "contiguous":
            assert case.bytes(lse=0) == plain[case.size]


# What is measured on a GPU, on kernels that stand in for kernels.cu.


@pytest.mark.parametrize("kind", sorted(KINDS - {"8-byte aligned", "FP8 inputs"}))
def test_between_neighbours(kind, monkeypatch):
    calls = stand_in_kernels(monkeypatch)
    case = Case(8, 4, 128, kind=kind)
    record = neighbours.measure(case, [OURS, EAGER] if kind == "contiguous" else [OURS], CPU, 1)
    assert record["refused"] == {}
    assert record["us"].pop("neighbours") == 2  # the producer and the consumer
    assert set(record["us"].values()) == {1}  # what is added: a call of the stand-in timer
    assert len(record["us"]) == (6 if kind == "contiguous" else 5)
    memory = {len(parts[0]) for parts in calls["produce"]}
    assert memory == {8 * 4 * 128 * (3 if kind == "padded heads" else 2)}
    assert all(abs(moved - case.bytes(lse=0)) <= 24 for moved in calls["plain"])


@pytest.mark.parametrize("kind", sorted(KINDS))
def test_cold(kind, monkeypatch):
    calls = stand_in_kernels(monkeypatch)
    case = Case(8, 4, 128, kind=kind)
    record = cold.measure(case, [OURS], CPU, 1)
    assert record["refused"] == {}
    assert len(record["us"]) == 13
    assert all(abs(moved - case.bytes()) <= 24 for moved in calls["plain"])


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
    turns = [names for round_, names in timing._turns(["a", "b", "c"], 3) if round_ >= 0]
    assert [names[0] for names in turns] == ["a", "b", "c"]
    assert {tuple(sorted(names)) for names in turns} == {("a", "b", "c")}


def test_a_record_has_the_times_of_every_process():
    times = [{"ours": 5.0, "plain, a": 3.0, "plain, b": 2.0},
             {"ours": 4.0, "plain, a": 1.0, "plain, b": 1.5},
             {"ours": 4.5, "plain, a": 3.5, "plain, b": 2.5}]  # fmt: skip
    (record,) = joined([[{"case": "x", "us": us, "refused": {}}] for us in times])
    assert record["us"] == {"ours": [5, 4, 4.5], "limit": [2, 1.5, 2.5]}
    assert time_of(record, "ours") == 4.5
    assert ratio(record, "ours", "limit") == 2.5  # of 2.5, 2.67 and 1.8; of the medians it is 2.25
    assert record["limit"] == "b"


# The commands.


SMOKE = ["--device", "cpu", "--case", "1x5x", "--rounds", "1"]


def test_the_command_measures(capfd):
    assert run.main([*SMOKE, "--processes", "2"]) == 0
    said = capfd.readouterr().out
    assert "| merge_attn_states, by keyword |" in said
    assert "| 1x5x128 fp16 | 0.004 |" in said
    assert "| CPU, 4 KB: time of the formula in eager PyTorch over ours | >= 1 |" in said


def test_a_case_that_is_none_is_said():
    with pytest.raises(SystemExit, match="no case's name holds 'none such'"):
        run.main(["--device", "cpu", "--only", "cpu", "--processes", "1", "--case", "none such"])


def test_results_make_their_folder(tmp_path):
    path = tmp_path / "new" / "mine.json"
    Results({"gpu": None}).save(path)
    assert Results.load(path).environment == {"gpu": None}


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "expected 1 or more, got 0"),
        (["--device", "meta"], "expected cpu or a CUDA device of this PyTorch's: meta"),
        (["--device", "cuda:99"], "expected cpu or a CUDA device of this PyTorch's: cuda:99"),
        (["--device", "cpu", "--only", "cold"], "cold: measured on a GPU only"),
        (["--output", "x.json", "--case", "1x5"], "--output takes whole groups"),
    ],
)
def test_a_wrong_option_is_said_at_once(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert said in f"{capsys.readouterr().err}{caught.value}"


# Of which sources a result is.


def test_a_tree_has_the_hash_that_git_gives_it(tmp_path):
    """A folder sorts as if its name ended with a slash; what a build leaves counts for nothing."""
    files = ["ab/x", "ab.c", "ab-c", "ab0", "deep/er/z", "k.so", "p/__pycache__/q"]
    for index, name in enumerate(files):
        path = tmp_path / "tree" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(bytes(range(index)))
    (tmp_path / "tree" / "without").mkdir()
    (tmp_path / ".gitignore").write_text("*.so\n__pycache__\n")

    def git(*arguments):
        command = ["git", "-C", str(tmp_path), "-c", "core.autocrlf=false", *arguments]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "-q")
    git("add", ".")
    whole = git("write-tree")
    assert environment.tree_hash(tmp_path / "tree") == git("rev-parse", f"{whole}:tree")


def sources_where(monkeypatch, committed, built="a" * 40):
    """What the sources are said to be where git names these trees, by commit."""
    info = merge_attn_states.build_info() | {"commit": built}
    monkeypatch.setattr(merge_attn_states, "build_info", lambda: info)
    here = {tree: environment.tree_hash(environment.ROOT / tree) for tree in environment.TREES}

    def git(command, *arguments):
        commit, _, tree = arguments[-1].partition(":")
        if not tree:
            return "h" * 40 if committed else ""
        return {"same": here[tree], "other": "0" * 40, "unknown": ""}[committed[commit[0]]]

    monkeypatch.setattr(environment, "git", git)
    return environment.sources


def test_changed_sources_are_seen(monkeypatch):
    clean = sources_where(monkeypatch, {"h": "same", "a": "unknown"})()
    assert (clean["commit"], clean["dirty"]) == ("h" * 40, False)
    assert set(clean["trees"]) == {"csrc", "include", "python"}
    assert sources_where(monkeypatch, {"h": "other", "a": "unknown"})()["dirty"]
    assert sources_where(monkeypatch, {"h": "same", "a": "other"})()["dirty"]  # binary of others
    dirty_binary = sources_where(monkeypatch, {"h": "same", "a": "same"}, "a" * 40 + "-dirty")
    assert dirty_binary()["dirty"]
    without_git = sources_where(monkeypatch, {})
    with pytest.raises(SystemExit, match="--commit HASH"):
        without_git()
    monkeypatch.setattr(environment, "git", lambda *_: "")
    assert environment.sources("c" * 40)["commit"] == "c" * 40


def test_changed_sources_are_not_measured(monkeypatch, tmp_path):
    changed = {"trees": TREES, "commit": "c" * 40, "dirty": True}
    monkeypatch.setattr(environment, "sources", lambda commit: dict(changed))
    options = run.parser().parse_args(["--device", "cpu", "--output", str(tmp_path / "r.json")])
    with pytest.raises(SystemExit, match="commit and build again"):
        run.open_results(options)


def test_results_of_another_machine_stay_as_they_are(monkeypatch, tmp_path):
    file = tmp_path / "results.json"
    synthetic().save(file)
    clean = {"trees": TREES, "commit": "c" * 40, "dirty": False}
    monkeypatch.setattr(environment, "sources", lambda commit: clean)
    options = run.parser().parse_args(["--device", "cpu", "--output", str(file)])
    with pytest.raises(SystemExit, match="holds other results: gpu is None now and 'NVIDIA H100"):
        run.open_results(options)
    same = environment_of("NVIDIA H100 80GB HBM3")
    monkeypatch.setattr(environment, "identity", lambda *_: same)
    results, _ = run.open_results(options)
    others = [one for one in results.records if one["group"] != "cpu"]
    results.add("cpu", {}, [{"case": "new", "us": {}, "refused": {}}])
    assert [one["case"] for one in results.select("cpu")] == ["new"]
    assert [one for one in results.records if one["group"] != "cpu"] == others


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 0}', '{"schema": 1, "runs": {}}'])
def test_what_is_no_results_file_is_said(text, tmp_path):
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"some.json is no results file: \w+"):
        Results.load(file)
