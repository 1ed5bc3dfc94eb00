"""The C entry from outside: a program without Python, of this version or another; plain C."""

import ctypes
import os
import re
from pathlib import Path

import pytest
import torch
from support import compiled, compiler, run_command

from merge_attn_states._library import OP_LIBRARY

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "include" / "merge_attn_states.h"
WARNINGS = ["-Wall", "-Wextra", "-Werror", "-pedantic"]
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


# Other versions of the header, made from this one so that they cannot drift.
OPTIONAL = {"tensor": ["memory", "memory_bytes"], "args": [
    "prefill_tokens_with_context", "has_prefill_tokens_with_context", "dependent_launch",
]}  # fmt: skip


def shortened(header: str) -> str:
    """As of the first version, which had no optional fields."""
    for struct, fields in OPTIONAL.items():
        for field in fields:
            pattern = rf"^  [\w *]+\b{field};.*\n(?=(?:.*\n){{0,5}}}} merge_attn_states_{struct};)"
            header, found = re.subn(pattern, "", header, flags=re.MULTILINE)
            assert found == 1, f"{struct} ends with {field}"
    return header


def lengthened(header: str) -> str:
    """As of a later version: a field more in each struct."""
    for struct in ("tensor", "args", "selection"):
        end = f"}} merge_attn_states_{struct};"
        assert header.count(end) == 1
        header = header.replace(end, f"  int64_t later;\n{end}")
    return header


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="preloaded libraries would come along")
@pytest.mark.parametrize("change", [None, shortened, lengthened])
def test_a_program_without_python_merges(change, tmp_path):
    """Compiled against the header of this version, of an older and of a newer one."""
    program, header = tmp_path / "merge_from_c", tmp_path / HEADER.name
    header.write_text(change(HEADER.read_text()) if change else HEADER.read_text())
    source = ROOT / "tests" / "c_api" / "merge_from_c.cpp"
    flags = ["-std=c++17", *WARNINGS, f"-I{tmp_path}"]
    if change:
        flags.append(f"-D{change.__name__.upper()}")
    run_command(compiler("CXX", "c++", "g++"), *flags, source, "-o", program, "-ldl", "-rdynamic")
    paths = os.pathsep.join([str(TORCH_LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")])
    shown = run_command(program, OP_LIBRARY, LD_LIBRARY_PATH=paths.rstrip(os.pathsep))
    lines = shown.splitlines()
    assert len(lines) >= 10
    assert all(line.startswith("ok: ") for line in lines), shown


def test_the_header_is_plain_c():
    run_command(
        compiler("CC", "cc", "gcc"), "-std=c11", *WARNINGS, "-x", "c", "-fsyntax-only", HEADER
    )


def test_the_header_is_old_cpp():
    run_command(
        compiler("CXX", "c++", "g++"), "-std=c++11", *WARNINGS, "-x", "c++", "-fsyntax-only", HEADER
    )


NAME_OF_DTYPE = """
#include <cstdio>

#include "core/tensor_view.h"
extern "C" void name_of_dtype(int code, int bits, int lanes, char* name) {
  const uint32_t dtype = code | bits << 8 | lanes << 16;
  std::snprintf(name, 64, "%s", merge_attn_states::dtype_name(dtype).c_str());
}
"""


def test_every_dtype_has_a_name(tmp_path):
    """Also one that says something else than its code: a message must not contradict itself."""
    library = compiled(tmp_path, NAME_OF_DTYPE, "core/tensor_view.cpp")
    expected = {
        (0, 32, 1): "int32",
        (2, 16, 1): "float16",
        (4, 16, 1): "bfloat16",
        (4, 16, 4): "bfloat16_x4",
        (3, 64, 1): "a dtype without a DLPack code",
        (6, 8, 1): "bool",
        (10, 8, 1): "float8_e4m3fn",
        (10, 16, 1): "float8_e4m3fn of 16 bits",
        (17, 4, 2): "float4_e2m1fn_x2",
        (99, 8, 1): "dtype code 99",
    }
    name = ctypes.create_string_buffer(64)
    for dtype, text in expected.items():
        library.name_of_dtype(*dtype, name)
        assert name.value.decode() == text
