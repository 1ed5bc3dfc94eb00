"""The build explains itself: a refusal is one sentence, and a package holds all it needs."""

import importlib
import importlib.metadata
import os
import shutil
import subprocess
import sys
import tarfile
from pathlib import Path

import pytest

import merge_attn_states

ROOT = Path(__file__).parents[1]
BUILD_VARIABLES = ("CUDA_HOME", "CXX", "TORCH_CUDA_ARCH_LIST")


def environment(**variables: str) -> dict[str, str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in BUILD_VARIABLES and not name.startswith("MERGE_ATTN_STATES_")
    }
    return kept | variables


def build(*command: str, **variables: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [sys.executable, "setup.py", *command],
        cwd=ROOT,
        env=environment(**variables),
        capture_output=True,
        text=True,
        check=False,
    )


def assert_refused(ran: subprocess.CompletedProcess, sentence: str) -> None:
    assert ran.returncode != 0
    assert ran.stderr.strip().splitlines()[-1] == f"merge_attn_states: {sentence}"
    assert "Traceback" not in ran.stderr


@pytest.mark.parametrize(
    ("variables", "sentence"),
    [
        (
            {"MERGE_ATTN_STATES_CUDA": "1", "CUDA_HOME": "/nonexistent"},
            "MERGE_ATTN_STATES_CUDA=1 asks for the CUDA kernels, but CUDA_HOME=/nonexistent has no "
            "bin/nvcc.",
        ),
        (
            {"MERGE_ATTN_STATES_CUDA": "1", "MERGE_ATTN_STATES_SANITIZE": "1"},
            "MERGE_ATTN_STATES_CUDA=1 asks for the CUDA kernels, but MERGE_ATTN_STATES_SANITIZE=1 "
            "is a CPU build.",
        ),
        (
            {"MERGE_ATTN_STATES_CUDA": "yes"},
            "MERGE_ATTN_STATES_CUDA: expected auto, 1 or 0, got 'yes'.",
        ),
        (
            {"MERGE_ATTN_STATES_OP_LIBRARY": "/nonexistent.so"},
            "MERGE_ATTN_STATES_OP_LIBRARY: there is no file /nonexistent.so.",
        ),
        (
            {"CXX": "/nonexistent/c++"},
            "no C++ compiler '/nonexistent/c++': install the package g++ or build-essential.",
        ),
    ],
    ids=["no toolkit", "sanitizer with CUDA", "unknown switch", "no op library", "no compiler"],
)
def test_refused(variables, sentence):
    assert_refused(build("build_ext", "--inplace", **variables), sentence)


@pytest.mark.parametrize(
    ("torch", "sentence"),
    [
        (
            "__version__ = '2.10.0+cpu'",
            "PyTorch 2.11 or newer is needed to build, and this is 2.10.0+cpu.",
        ),
        (
            "raise ImportError",
            "PyTorch 2.11 or newer is needed to build, and this Python has none.",
        ),
    ],
    ids=["too old", "missing"],
)
def test_unfit_pytorch_is_refused(torch, sentence, tmp_path):
    # A stand-in package that shadows the real one.
    (tmp_path / "torch" / "utils").mkdir(parents=True)
    (tmp_path / "torch" / "__init__.py").write_text(torch)
    extension = "from setuptools.command.build_ext import build_ext as BuildExtension"
    (tmp_path / "torch" / "utils" / "__init__.py").touch()
    (tmp_path / "torch" / "utils" / "cpp_extension.py").write_text(extension)
    assert_refused(build("build_ext", "--inplace", PYTHONPATH=str(tmp_path)), sentence)


@pytest.mark.parametrize(
    ("options", "installed", "constraint"),
    [
        ([], [], "/etc/constraints.txt"),  # this interpreter's own PyTorch is used
        (["--release", "2.15.0"], ["torch==2.15.0"], os.devnull),
    ],
    ids=["any", "a release"],
)
def test_a_release_is_installed_beside_another_pytorch(
    options, installed, constraint, monkeypatch, tmp_path
):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    environment = importlib.import_module("environment")
    commands = []
    monkeypatch.setattr(environment, "torch_version", lambda python: (2, 13))
    monkeypatch.setattr(environment, "link_site_packages", lambda *_: None)
    monkeypatch.setattr(environment, "check_machine", lambda: None)
    monkeypatch.setattr(environment.venv, "create", lambda *_, **__: None)
    monkeypatch.setattr(
        environment.subprocess, "run", lambda command, **_: commands.append(command)
    )
    monkeypatch.setattr(sys, "argv", ["environment.py", str(tmp_path / "new"), *options])
    monkeypatch.setenv("PIP_CONSTRAINT", "/etc/constraints.txt")
    environment.main()
    named = [word for command in commands for word in command]
    assert [word for word in named if str(word).startswith("torch==")] == installed
    assert os.environ["PIP_CONSTRAINT"] == constraint


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    ran = build("-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "include").rglob("*")]
    needed = {str(path.relative_to(ROOT)) for path in sources if path.is_file()}
    needed |= {"pyproject.toml", "setup.py", "LICENSE", "Makefile", "COMMIT"}
    needed |= {"examples/demo/__main__.py", "examples/demo/shapes.py"}
    needed |= {"python/merge_attn_states/py.typed", "tests/conftest.py", "scripts/environment.py"}
    assert needed - held == set()
    assert [name for name in held if name.endswith((".so", ".o", ".pyc"))] == []


def test_a_wheel_holds_the_package_alone(tmp_path):
    ran = build("-q", "build_py", "--build-lib", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    held = {path.relative_to(tmp_path) for path in tmp_path.rglob("*") if path.is_file()}
    assert {path.parts[0] for path in held} == {"merge_attn_states", "merge_attn_states_vllm.py"}
    assert Path("merge_attn_states/integrations/transformers.py") in held
    assert [path for path in held if "demo" in str(path) or path.name.startswith("test_")] == []


def test_version_is_one():
    built = merge_attn_states.build_info()["version"]
    assert f'version = "{built}"\n' in (ROOT / "pyproject.toml").read_text()
    try:
        assert importlib.metadata.version("merge-attn-states") == built
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("built in place, not installed: there is no metadata to compare")


def test_package_is_typed():
    assert Path(merge_attn_states.__file__).with_name("py.typed").is_file()


def test_headers_are_tracked_for_cuda_files():
    # BuildExtension tracks none on a CPU PyTorch unless told to: a stale kernel would stay.
    objects = ROOT / "build" / "objects" / "libmerge_attn_states"
    ninja = pytest.importorskip("ninja", reason="the environment has no ninja")
    tools = ninja.BIN_DIR or Path(ninja.__file__).parents[4] / "bin"  # as setup.py finds it
    if not (objects / "build.ninja").is_file():
        pytest.skip("nothing was built in this checkout")
    if "nvcc = " not in (objects / "build.ninja").read_text():
        pytest.skip("built without CUDA kernels")
    command = [f"{tools}/ninja", "-t", "deps", str(objects / "csrc" / "cuda" / "pair.o")]
    deps = subprocess.run(command, cwd=objects, capture_output=True, text=True, check=True).stdout
    assert str(ROOT / "csrc" / "core" / "state.h") in deps


def test_info_without_the_op_library_is_one_sentence(tmp_path):
    package = Path(merge_attn_states.__file__).parent
    shutil.copytree(package, tmp_path / "merge_attn_states", ignore=shutil.ignore_patterns("*.so"))
    ran = subprocess.run(
        [sys.executable, "-m", "merge_attn_states", "info"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 1
    assert "libmerge_attn_states.so is missing" in ran.stderr
    assert ran.stderr.count("\n") == 1
