"""The CUDA toolkit that the build finds, and the architectures that it chooses."""

import importlib
import os
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
VARIABLES = ("CUDA_HOME", "TORCH_CUDA_ARCH_LIST", "MERGE_ATTN_STATES_CUDA")


@pytest.fixture
def toolkits(monkeypatch):
    """scripts/cuda_toolkit.py, with nothing asked for by the environment."""
    for name in VARIABLES:
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
