"""What the two binaries export, need and hold: the promises under which one build serves all."""

import ctypes
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import merge_attn_states
from merge_attn_states._library import OP_LIBRARY

ROOT = Path(__file__).parents[1]
# Of callers, and of the Python module alone.
HEADERS = ROOT / "include" / "merge_attn_states.h", ROOT / "csrc" / "ranks_entry.h"
NEWEST_GLIBC = (2, 34)
NEWEST_GLIBCXX = (3, 4, 29)  # GCC 11, the libstdc++ of the systems with glibc 2.34
RELEASE_SYSTEM = (2, 36)  # a build on a newer system may need that system's glibc
SYSTEM_LIBRARIES = re.compile(r"lib(stdc\+\+|gcc_s|m|c|dl|rt|pthread)\.so\.\d+|ld-linux-.*")

needs_binutils = pytest.mark.skipif(
    not (shutil.which("nm") and shutil.which("readelf")), reason="binutils are missing"
)


def output_of(*command: object) -> str:
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, check=True
    ).stdout


def dynamic_symbols(path: Path, kind: str) -> set[str]:
    lines = output_of("nm", "-D", f"--{kind}-only", path).splitlines()
    return {line.split()[-1] for line in lines}


def needed_libraries(path: Path) -> set[str]:
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", output_of("readelf", "-d", path)))


def number(text: str) -> tuple[int, ...]:
    return tuple(map(int, text.split(".")))


@needs_binutils
def test_op_library_exports_the_c_entry_alone():
    declared = [set(re.findall(r"(merge_attn_states_\w+)\(", x.read_text())) for x in HEADERS]
    assert len(declared[0]) >= 3
    assert len(declared[1]) == 1
    assert dynamic_symbols(OP_LIBRARY, "defined") == declared[0] | declared[1]


@needs_binutils
def test_op_library_needs_libtorch_cpu_and_the_system():
    needed = needed_libraries(OP_LIBRARY)
    ours = {name for name in needed if not SYSTEM_LIBRARIES.fullmatch(name)}
    assert ours <= {"libtorch_cpu.so", "libc10.so"}
    assert "libtorch_cpu.so" in ours


@needs_binutils
def test_op_library_finds_every_symbol_in_libtorch_cpu():
    # So it needs neither Python nor libtorch_cuda: libtorch_cpu depends on neither.
    libtorch_cpu = ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    undefined = {name for name in dynamic_symbols(OP_LIBRARY, "undefined") if "@" not in name}
    wanted = {name for name in undefined if not re.match(r"__gmon_start__|_ITM_", name)}
    assert any(name.startswith("aoti_torch_") for name in wanted)
    assert [name for name in sorted(wanted) if not hasattr(libtorch_cpu, name)] == []


@needs_binutils
@pytest.mark.parametrize(
    ("library", "newest"), [("GLIBC", NEWEST_GLIBC), ("GLIBCXX", NEWEST_GLIBCXX)]
)
def test_op_library_runs_on_older_systems(library, newest):
    here = number(os.confstr("CS_GNU_LIBC_VERSION").split()[1])
    if here > RELEASE_SYSTEM and "MERGE_ATTN_STATES_OP_LIBRARY" not in os.environ:
        pytest.skip(f"built on glibc {here}; a release is built on {RELEASE_SYSTEM} or older")
    versions = re.findall(rf"@{library}_([\d.]+)", output_of("nm", "-D", OP_LIBRARY))
    assert versions
    assert max(map(number, versions)) <= newest


@needs_binutils
def test_a_cpu_pytorch_has_loaded_cuda_kernels():
    if torch.version.cuda or torch.version.hip:
        pytest.skip("this PyTorch is not a CPU build")
    if merge_attn_states.build_info()["cuda"] is None:
        pytest.skip("built without CUDA kernels")
    assert ".nv_fatbin" in output_of("readelf", "-SW", OP_LIBRARY)
    assert not any("cuda" in name for name in needed_libraries(OP_LIBRARY))
    output, part, lse = torch.zeros(3, 2, 8), torch.ones(3, 2, 8), torch.zeros(2, 3)
    merge_attn_states.merge_attn_states(output, part, lse, part, lse)
    assert torch.equal(output, part)


@needs_binutils
def test_python_module_knows_pytorch_by_its_stable_c_functions_alone():
    """No mangled name and no variable of PyTorch's: those change from release to release."""
    module = pytest.importorskip("merge_attn_states._C", reason="_C is not built for this CPython")
    path = Path(module.__file__)
    needed = {name for name in needed_libraries(path) if not SYSTEM_LIBRARIES.fullmatch(name)}
    assert needed - {"libc10.so"} == {OP_LIBRARY.name, "libtorch_cpu.so"}
    assert re.search(r"\(R(UN)?PATH\).*\[\$ORIGIN\]", output_of("readelf", "-d", path))
    undefined = dynamic_symbols(path, "undefined")
    of_torch = {name for name in undefined if re.search(r"torch|c10|aten|at::", name)}
    assert "torch_get_const_data_ptr" in of_torch
    assert not [name for name in of_torch if not re.fullmatch(r"(aoti_)?torch_[a-z0-9_]+", name)]


@pytest.mark.skipif(
    importlib.util.find_spec("torch_abi_audit") is None, reason="torch-abi-audit is not installed"
)
def test_stable_abi_audit():
    # Through its function: pip puts the command where PATH may not lead.
    audit = "import sys; from torch_abi_audit.cli import main; sys.exit(main())"
    report = output_of(sys.executable, "-c", audit, "--check", "torch", "--json", OP_LIBRARY)
    (library,) = json.loads(report)["bundled_libs"]
    assert library["torch"]["uses_torch"]
    assert number(library["torch"]["min_torch_version"]) <= (2, 11, 0)
