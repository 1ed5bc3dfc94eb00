"""The build explains itself: a refusal is one sentence, and a package holds all it needs."""

import importlib
import importlib.metadata
import os
import re
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


@pytest.fixture
def toolkits(monkeypatch):
    """scripts/cuda_toolkit.py, with nothing asked for by the environment."""
    for name in (*BUILD_VARIABLES, "MERGE_ATTN_STATES_CUDA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("cuda_toolkit")


def make_nvcc(folder: Path, architectures: str = "", top: str = "") -> Path:
    """A folder whose bin/nvcc answers the three questions of the build."""
    nvcc = folder / "bin" / "nvcc"
    nvcc.parent.mkdir(parents=True)
    answers = "\n".join(f"compute_{number}" for number in architectures.split())
    nvcc.write_text(
        f"""#!/bin/sh
case $1 in
  --version) echo "Cuda compilation tools, release 12.4, V12.4.131" ;;
  --list-gpu-arch) echo "{answers}" ;;
  --dryrun) echo '#$ _HERE_=/elsewhere/bin' >&2; echo '#$ TOP={top}' >&2 ;;
esac
"""
    )
    nvcc.chmod(0o755)
    return folder


def test_toolkit_is_looked_for_in_order(toolkits, monkeypatch, tmp_path):
    real = make_nvcc(tmp_path / "toolkit")
    wrapper = make_nvcc(tmp_path / "wrapper", top=f"{real}/bin/..")
    monkeypatch.setattr(toolkits, "DEFAULT_TOOLKIT", tmp_path / "none")
    monkeypatch.setenv("PATH", "/nonexistent")
    assert toolkits.find_toolkit()[0] is None
    monkeypatch.setenv("PATH", f"{wrapper}/bin{os.pathsep}{os.environ['PATH']}")
    assert toolkits.find_toolkit()[0] == real
    monkeypatch.setattr(toolkits, "DEFAULT_TOOLKIT", make_nvcc(tmp_path / "default"))
    assert toolkits.find_toolkit()[0] == tmp_path / "default"
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "chosen")))
    assert toolkits.find_toolkit()[0] == tmp_path / "chosen"
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")  # a wrong choice is not replaced by another
    assert toolkits.find_toolkit() == (None, "CUDA_HOME=/nonexistent has no bin/nvcc")


@pytest.mark.parametrize(
    ("known", "requested", "chosen"),
    [
        ("80 86 89 90 100 120", "", "8.0 8.6 8.9 9.0 10.0+PTX 12.0"),
        ("80 86 89 90", "", "8.0 8.6 8.9 9.0+PTX"),  # an older nvcc
        ("80 90 100", "8.0;9.0a 10.0+PTX", "8.0 9.0a 10.0+PTX"),
    ],
)
def test_architectures(known, requested, chosen, toolkits, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "cuda", known)))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    toolkit = toolkits.choose_toolkit("")
    assert toolkit.architectures == chosen.split()
    assert toolkit.version == "12.4"
    said = capsys.readouterr().out
    assert said == f"merge_attn_states: CUDA 12.4 at {tmp_path}/cuda, kernels for {chosen}\n"


@pytest.mark.parametrize("requested", ["Hopper", "9", "9.0+", "7.0"])
def test_architectures_refused(requested, toolkits, monkeypatch, tmp_path):
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "cuda", "80 90")))
    monkeypatch.setenv("TORCH_CUDA_ARCH_LIST", requested)
    with pytest.raises(SystemExit, match=re.escape(requested)):
        toolkits.choose_toolkit("")


def test_gencodes(toolkits):
    assert toolkits.Toolkit(Path("/"), "13.0", ["9.0a", "10.0+PTX"]).gencodes() == [
        "-gencode=arch=compute_90a,code=sm_90a",
        "-gencode=arch=compute_100,code=sm_100",
        "-gencode=arch=compute_100,code=compute_100",
    ]


def test_a_cpu_build_says_so(toolkits, monkeypatch, capsys):
    monkeypatch.setenv("CUDA_HOME", "/nonexistent")
    assert toolkits.choose_toolkit("") is None
    assert capsys.readouterr().out == (
        "merge_attn_states: no CUDA kernels in this build, CPU only: "
        "CUDA_HOME=/nonexistent has no bin/nvcc\n"
    )


def test_a_toolkit_is_not_used_where_it_must_not_be(toolkits, monkeypatch, tmp_path, capsys):
    monkeypatch.setenv("CUDA_HOME", str(make_nvcc(tmp_path / "cuda", "90")))
    assert toolkits.choose_toolkit("PyTorch 2.13.0 is a ROCm build") is None
    assert "CPU only: PyTorch 2.13.0 is a ROCm build" in capsys.readouterr().out


def test_sdist_holds_all_that_a_build_needs(tmp_path):
    ran = build("-q", "egg_info", "--egg-base", str(tmp_path), "sdist", "--dist-dir", str(tmp_path))
    assert ran.returncode == 0, ran.stderr
    with tarfile.open(next(tmp_path.glob("*.tar.gz"))) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    sources = [*(ROOT / "csrc").rglob("*"), *(ROOT / "include").rglob("*")]
    needed = {str(path.relative_to(ROOT)) for path in sources if path.is_file()}
    needed |= {"pyproject.toml", "setup.py", "LICENSE", "Makefile", "COMMIT"}
    needed |= {"python/merge_attn_states/py.typed", "tests/conftest.py", "scripts/environment.py"}
    assert needed - held == set()
    assert [name for name in held if name.endswith((".so", ".o", ".pyc"))] == []


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
