"""The C entry from outside: a C++ program without Python merges, and the header is plain C."""

import os
from pathlib import Path

import pytest
import torch
from support import compiler, run_command

from merge_attn_states._library import OP_LIBRARY

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "include" / "merge_attn_states.h"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{HEADER.parent}"]
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="preloaded libraries would come along")
def test_a_program_without_python_merges(tmp_path):
    program = tmp_path / "merge_from_c"
    source = ROOT / "tests" / "c_api" / "merge_from_c.cpp"
    run_command(compiler("CXX", "c++", "g++"), "-std=c++17", *STRICT, source, "-o", program, "-ldl")
    paths = os.pathsep.join([str(TORCH_LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")])
    shown = run_command(program, OP_LIBRARY, LD_LIBRARY_PATH=paths.rstrip(os.pathsep))
    lines = shown.splitlines()
    assert len(lines) >= 10
    assert all(line.startswith("ok: ") for line in lines), shown


def test_the_header_is_plain_c():
    run_command(
        compiler("CC", "cc", "gcc"), "-std=c11", *STRICT, "-x", "c", "-fsyntax-only", HEADER
    )


def test_the_header_is_old_cpp():
    run_command(
        compiler("CXX", "c++", "g++"), "-std=c++11", *STRICT, "-x", "c++", "-fsyntax-only", HEADER
    )
