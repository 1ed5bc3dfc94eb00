"""Of which sources a result is, and what the commands refuse before they measure."""

import subprocess

import pytest
from benchmark_support import HANDED_IN

import merge_attn_states
from benchmarks import environment as environments
from benchmarks import report, run


@pytest.fixture
def built_from(monkeypatch):
    """Let the binary say what it was built from."""

    def say(commit):
        info = merge_attn_states.build_info() | {"commit": commit}
        monkeypatch.setattr(merge_attn_states, "build_info", lambda: info)

    return say


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
    assert environments.tree_hash(tmp_path / "tree") == git("rev-parse", f"{whole}:tree")


def test_changed_sources_are_seen(built_from, monkeypatch):
    built_from("e" * 40)
    trees = environments.source_trees(HANDED_IN)
    assert not trees["dirty"]
    monkeypatch.setattr(environments, "git", lambda _, what: trees.get(what[5:], "e" * 40))
    assert environments.source_trees(None) == trees
    monkeypatch.setattr(environments, "git", lambda _, what: "f" * 40)
    assert environments.source_trees(None)["dirty"]
    built_from(f"{'e' * 40}-dirty")
    assert environments.source_trees(HANDED_IN)["dirty"]


@pytest.mark.parametrize(
    ("given", "said"),
    [
        ("csrc=1", "expected csrc=HASH,python=HASH,commit=HASH"),
        ("csrc=,python=,commit=", "expected csrc=HASH,python=HASH,commit=HASH"),
        (HANDED_IN.replace("csrc=", "csrc=0"), "csrc is .* here, not 0"),
    ],
)
def test_hashes_of_other_sources_are_refused(given, said):
    with pytest.raises(SystemExit, match=f"--source-trees: {said}"):
        environments.source_trees(given)


def test_without_git_the_hashes_are_asked_for(monkeypatch, tmp_path):
    monkeypatch.setattr(environments, "git", lambda *arguments: None)
    with pytest.raises(SystemExit, match="must be handed in"):
        run.main(["--quick", "--device", "cpu", "--output", str(tmp_path / "results.json")])


def test_a_binary_of_other_sources_is_refused(built_from, monkeypatch, tmp_path):
    built_from("e" * 40)
    trees = environments.source_trees(HANDED_IN)
    monkeypatch.setattr(environments, "git", lambda *arguments: "f" * 40)
    assert "build again" in environments.built_from_elsewhere(trees)
    monkeypatch.setattr(environments, "git", lambda *arguments: trees["csrc"])
    assert environments.built_from_elsewhere(trees) == ""
    monkeypatch.setattr(environments, "source_trees", lambda given: trees | {"dirty": True})
    with pytest.raises(SystemExit, match="csrc or python has changes"):
        run.main(["--device", "cpu", "--output", str(tmp_path / "results.json")])


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--rounds", "0"], "--rounds: expected 1 or more, got 0"),
        (["--device", "meta"], "--device: expected cpu or cuda, got meta"),
        (["--device", "nonsense"], "--device: Expected one of cpu, cuda"),
        (["--device", "cuda:99"], "--device: this PyTorch sees no cuda:99"),
        (
            ["--output", "/proc/no/results.json"],
            "--output: /proc/no/results.json cannot be written",
        ),
        (["--vllm-op-library", "/no/op.so"], "--vllm-op-library: /no/op.so is no file"),
        (["--vllm-version", "0.33.0"], "--vllm-version is of --vllm-op-library"),
    ],
)
def test_a_wrong_option_is_said_at_once(arguments, said, capsys):
    with pytest.raises(SystemExit) as caught:
        run.main(arguments)
    assert said in f"{capsys.readouterr().err}{caught.value}"


@pytest.mark.parametrize("text", ["", "[]", "{", '{"schema": 1}', '{"schema": 1, "runs": {}}'])
def test_what_is_no_results_file_is_said(text, tmp_path):
    file = tmp_path / "some.json"
    file.write_text(text)
    with pytest.raises(SystemExit, match=r"some.json is no results file: \w+"):
        report.load([file])
    with pytest.raises(SystemExit, match="is no results file: FileNotFoundError"):
        report.load([tmp_path / "none.json"])
