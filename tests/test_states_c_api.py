"""Many parts from outside: a program in plain C, of this version of the header or another one."""

import os
import re

import pytest
from support import compiler, run_command
from test_c_api import HEADER, ROOT, TORCH_LIBRARIES, WARNINGS

from merge_attn_states._library import OP_LIBRARY

# In the order of the header: what a program that was compiled against it has set.
FIELDS = {
    "part": ["struct_size", "output", "lse", "empty", "index", "lse_base", "reserved"],
    "parts_args": [
        "struct_size", "out", "out_lse", "parts", "num_parts", "out_lse_base", "is_stack",
        "stack_dim", "sink", "out_scale", "stream", "invert_empty", "dependent_launch",
    ],
    "update_args": [
        "struct_size", "out", "lse", "block_out", "block_lse", "index", "empty", "stream",
        "lse_base", "invert_empty", "dependent_launch", "reserved",
    ],
}  # fmt: skip


def body(header: str, struct: str) -> str:
    return re.search(rf"typedef struct merge_attn_states_{struct} {{\n(.*?)\n}}", header, re.S)[1]


def shortened(header: str) -> str:
    """A tensor of the first version, which did not say where its memory ends."""
    own = body(header, "tensor")
    older = "\n".join(line for line in own.splitlines() if "memory" not in line)
    assert len(own.splitlines()) == len(older.splitlines()) + 2
    return header.replace(own, older)


def lengthened(header: str) -> str:
    """As of a later version: a field more in each struct."""
    for struct in ("tensor", "part", "parts_args", "update_args", "selection"):
        end = f"}} merge_attn_states_{struct};"
        assert header.count(end) == 1
        header = header.replace(end, f"  int64_t later;\n{end}")
    return header


@pytest.mark.skipif("LD_PRELOAD" in os.environ, reason="preloaded libraries would come along")
@pytest.mark.parametrize("change", [None, shortened, lengthened])
@pytest.mark.parametrize("language", ["c", "c++"])
def test_a_program_merges_parts_and_updates_a_state(language, change, tmp_path):
    program, header = tmp_path / "parts_from_c", tmp_path / HEADER.name
    header.write_text(change(HEADER.read_text()) if change else HEADER.read_text())
    source = ROOT / "tests" / "c_api" / "parts_from_c.c"
    standard = {"c": "-std=gnu11", "c++": "-std=gnu++17"}[language]
    names = {"c": ("CC", "cc", "gcc"), "c++": ("CXX", "c++", "g++")}[language]
    flags = [standard, *WARNINGS, f"-I{tmp_path}"]
    if change:
        flags.append(f"-D{change.__name__.upper()}")
    run_command(compiler(*names), *flags, "-x", language, source, "-o", program, "-ldl", "-lm")
    paths = os.pathsep.join([str(TORCH_LIBRARIES), os.environ.get("LD_LIBRARY_PATH", "")])
    shown = run_command(program, OP_LIBRARY, LD_LIBRARY_PATH=paths.rstrip(os.pathsep))
    lines = shown.splitlines()
    assert len(lines) >= 50
    assert all(line.startswith("ok: ") for line in lines), shown


@pytest.mark.parametrize("struct", FIELDS)
def test_fields_are_added_at_the_end(struct):
    """A program that was compiled before has the first ones where they were."""
    declared = re.findall(r"^  [\w *]+?\b(\w+);", body(HEADER.read_text(), struct), re.MULTILINE)
    assert declared[: len(FIELDS[struct])] == FIELDS[struct]
