"""What a user reads where a binary or PyTorch itself cannot be loaded."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from support import compiler, run_command

from merge_attn_states._library import OP_LIBRARY

PACKAGE = OP_LIBRARY.parent
UNDEFINED = 'extern "C" void missing_in_this_release(); void (*kept)() = missing_in_this_release;'


@pytest.fixture
def folder(tmp_path):
    """A copy of the package without its binaries."""
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=ignored)
    return tmp_path


def said(folder: Path, *command: str) -> str:
    ran = subprocess.run(
        [sys.executable, *command], cwd=folder, capture_output=True, text=True, check=False
    )
    return f"{ran.returncode}: {ran.stdout}{ran.stderr}"


INFO = ("-m", "merge_attn_states", "info")


def test_a_library_of_another_release_says_what_it_lacks(folder):
    source = folder / "undefined.cpp"
    source.write_text(UNDEFINED)
    library = folder / PACKAGE.name / OP_LIBRARY.name
    run_command(compiler("CXX", "c++", "g++"), "-shared", "-fPIC", source, "-o", library)
    text = said(folder, *INFO)
    assert text.startswith(f"1: {OP_LIBRARY.name} cannot be loaded: it was built for another")
    assert "undefined symbol: missing_in_this_release" in text
    assert len(text.splitlines()) == 1


def test_a_file_that_is_no_library(folder):
    (folder / PACKAGE.name / OP_LIBRARY.name).write_bytes(b"no library" * 100)
    assert "it was built for another processor" in said(folder, *INFO)


def test_no_library(folder):
    text = said(folder, *INFO)
    assert f"{OP_LIBRARY.name} is missing: the package was not built here" in text


@pytest.mark.parametrize("error", ["ImportError", "OSError"])
def test_a_broken_pytorch_is_not_called_absent(error, folder):
    (folder / "torch.py").write_text(f"raise {error}('libcudnn.so.9: no such file')")
    expected = "1: merge_attn_states cannot import PyTorch: libcudnn.so.9: no such file\n"
    assert said(folder, *INFO) == expected


def test_no_pytorch(folder):
    text = said(folder, "-c", "import sys; sys.modules['torch'] = None; import merge_attn_states")
    assert text.rstrip().endswith("and this Python has none: install torch.")


def test_a_program_that_can_do_without_goes_on(folder):
    """Also where its command line begins and ends like ours."""
    engine = folder / "engine"
    engine.mkdir()
    (engine / "__init__.py").write_text(
        "try:\n    import merge_attn_states\nexcept ImportError:\n    print('without it')\n"
    )
    (engine / "__main__.py").write_text("")
    assert said(folder, "-m", "engine", "--op", "merge_attn_states") == "0: without it\n"
