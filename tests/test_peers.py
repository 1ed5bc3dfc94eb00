"""The protocol by which GPUs merge across ranks, on threads of a CPU."""

import os
import shutil
import subprocess
from pathlib import Path

import pytest

SOURCE = Path(__file__).parent / "peers" / "peers_on_threads.cpp"


@pytest.fixture(scope="module")
def program(tmp_path_factory):
    compiler = os.environ.get("CXX") or shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        pytest.skip("no C++ compiler")
    made = tmp_path_factory.mktemp("peers") / "peers_on_threads"
    flags = ["-std=c++20", "-O1", "-Wall", "-Wextra", "-Werror", "-ffp-contract=off", "-pthread"]
    flags += ["-Wno-unknown-pragmas", "-o", str(made), str(SOURCE)]
    subprocess.run([*compiler.split(), *flags], check=True)
    return made


def test_ranks_as_threads(program):
    ran = subprocess.run([program, "300"], capture_output=True, text=True, timeout=300, check=False)
    assert ran.returncode == 0, ran.stderr + ran.stdout
