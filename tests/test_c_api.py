"""The C entry from outside: a C++ program without Python merges, and the header is plain C."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest
import torch

from merge_attn_states._library import OP_LIBRARY

ROOT = Path(__file__).resolve().parent.parent
HEADER = ROOT / "include" / "merge_attn_states.h"
STRICT = ["-Wall", "-Wextra", "-Werror", "-pedantic", f"-I{HEADER.parent}"]
TORCH_LIBRARIES = Path(torch.__file__).parent / "lib"


def compiler(variable: str, *names: str) -> str:
    for name in (os.environ.get(variable), *names):
        if name and (found := shutil.which(name)):
            return found
    pytest.skip(f"no compiler: neither {variable} nor {' or '.join(names)} is here")


def run(*command, **environment) -> str:
    ran = subprocess.run(
        [str(part) for part in command],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, **environment},
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    return ran.stdout


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="preloaded libraries would come along")
def test_a_program_without_python_merges(tmp_path):
    program = tmp_path / "merge_from_c"
    source = ROOT / "tests" / "c_api" / "merge_from_c.cpp"
    run(compiler("CXX", "c++", "g++"), "-std=c++17", *STRICT, source, "-o", program, "-ldl")
    paths = os.pathsep.join([str(TORCH_LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")])
    shown = run(program, OP_LIBRARY, LD_LIBRARY_PATH=paths.rstrip(os.pathsep))
    lines = shown.splitlines()
    assert len(lines) >= 10
    assert all(line.startswith("ok: ") for line in lines), shown


def test_the_header_is_plain_c():
    run(compiler("CC", "cc", "gcc"), "-std=c11", *STRICT, "-x", "c", "-fsyntax-only", HEADER)


def test_the_header_is_old_cpp():
    run(compiler("CXX", "c++", "g++"), "-std=c++11", *STRICT, "-x", "c++", "-fsyntax-only", HEADER)
