"""A wheel that must not be published is refused, each fault by its own sentence."""

import importlib
import shutil
import zipfile
from pathlib import Path

import pytest

import merge_attn_states
from merge_attn_states._library import OP_LIBRARY

ROOT = Path(__file__).parents[1]
PLATFORM = "manylinux_2_34_x86_64"
OP_LIBRARY_IN_WHEEL = f"merge_attn_states/{OP_LIBRARY.name}"

pytestmark = pytest.mark.skipif(not shutil.which("readelf"), reason="binutils are missing")


@pytest.fixture
def release(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    return importlib.import_module("release_wheel")


@pytest.fixture
def files():
    """The binaries of this build, as they lie in a wheel."""
    module = pytest.importorskip("merge_attn_states._C", reason="_C is not built for this CPython")
    paths = [OP_LIBRARY, Path(module.__file__)]
    return {f"merge_attn_states/{path.name}": path.read_bytes() for path in paths}


def faults(release, folder, files, wanted=None, platform=PLATFORM, needs=PLATFORM, external=()):
    wheel = folder / f"merge_attn_states-0.1.0-cp311-cp311-{platform}.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, held in files.items():
            archive.writestr(name, held)
    libraries = dict.fromkeys(["libtorch_cpu.so", *external])
    return list(release.faults(wheel, {"sym_tag": needs, "external_libs": libraries}, wanted))


def test_this_build_is_fit_for_its_architectures(release, files, tmp_path):
    assert faults(release, tmp_path, files) == []
    built_for = merge_attn_states.build_info()["architectures"]
    if not built_for:
        pytest.skip("built without CUDA kernels")
    assert release.architectures(files[OP_LIBRARY_IN_WHEEL]) == built_for
    assert faults(release, tmp_path, files, wanted=built_for) == []
    (sentence,) = faults(release, tmp_path, files, wanted=[*built_for, "99.9"])
    assert sentence == f"its GPU code is for {built_for}, not for {[*built_for, '99.9']}"


@pytest.mark.parametrize(
    ("platform", "needs", "wanted", "sentence"),
    [
        ("linux_x86_64", PLATFORM, None, "it is tagged linux_x86_64, and its symbols need"),
        ("manylinux_2_28_x86_64", PLATFORM, None, "its symbols need manylinux_2_34_x86_64"),
        (
            "manylinux_2_39_x86_64",
            "manylinux_2_39_x86_64",
            [],  # only a release has to be old enough
            None,
        ),
        (
            "manylinux_2_39_x86_64",
            "manylinux_2_39_x86_64",
            ["9.0"],
            "build on a system of manylinux_2_34 or older",
        ),
    ],
)
def test_platform_tag(release, files, tmp_path, platform, needs, wanted, sentence):
    found = faults(release, tmp_path, files, wanted, platform, needs)
    if sentence is None:
        assert found == []
    else:
        assert any(sentence in fault for fault in found)


def test_another_library_is_refused(release, files, tmp_path):
    (needed,) = faults(release, tmp_path, files, external=["libc10.so", "libcudart.so.13"])
    assert needed == "it needs libcudart.so.13, which neither the system nor PyTorch brings"
    copy = "merge_attn_states.libs/libtorch_cpu-1a2b.so"
    assert faults(release, tmp_path, files | {copy: b""}) == [f"{copy} is vendored"]


def test_what_is_not_of_the_package_is_refused(release, files, tmp_path):
    names = ["merge_attn_states/ops.py", "merge_attn_states_vllm.py", "x-0.1.dist-info/METADATA"]
    assert faults(release, tmp_path, files | dict.fromkeys(names, b"")) == []
    demo = "examples/demo/shapes.py"
    assert faults(release, tmp_path, files | {demo: b""}) == [f"{demo} is not of the package"]


def test_a_large_op_library_is_refused(release, files, tmp_path, monkeypatch):
    size = len(files[OP_LIBRARY_IN_WHEEL])
    monkeypatch.setattr(release, "LARGEST_OP_LIBRARY", size)
    assert faults(release, tmp_path, files) == []
    monkeypatch.setattr(release, "LARGEST_OP_LIBRARY", size - 1)
    (sentence,) = faults(release, tmp_path, files)
    assert sentence == f"the op library has {size:,} bytes, more than {size - 1:,}"


def test_a_module_that_finds_no_op_library_is_refused(release, files, tmp_path):
    (name,) = (name for name in files if "/_C." in name)
    elsewhere = files | {name: files[name].replace(b"$ORIGIN", b"/nowher")}
    assert faults(release, tmp_path, elsewhere) == [
        "_C does not look for the op library beside itself ($ORIGIN)"
    ]
    del files[name]
    assert faults(release, tmp_path, files) == [f"{OP_LIBRARY.name} or _C is missing"]


def test_a_release_is_built_for_every_architecture(release, capsys):
    inherited = {"TORCH_CUDA_ARCH_LIST": "9.0", "MERGE_ATTN_STATES_CUDA": "0", "PATH": "/bin"}
    chosen = release.release_environment(inherited)
    assert chosen["TORCH_CUDA_ARCH_LIST"] == "8.0 8.6 8.9 9.0 10.0+PTX 12.0"
    assert chosen["MERGE_ATTN_STATES_CUDA"] == "1"
    assert chosen["PATH"] == "/bin"
    assert "TORCH_CUDA_ARCH_LIST=9.0 is ignored" in capsys.readouterr().out
    release.release_environment({})
    assert capsys.readouterr().out == ""
