"""README's python blocks run as they stand, each in a namespace of its own."""

import re
from pathlib import Path

import pytest
import torch

README = Path(__file__).parents[1] / "README.md"
TEXT = README.read_text(encoding="utf-8") if README.exists() else ""
BLOCKS = {  # by the number of the line before the code
    TEXT[: block.start(1)].count("\n"): block[1]
    for block in re.finditer(r"^```python\n(.*?)^```", TEXT, re.MULTILINE | re.DOTALL)
}


def test_there_is_an_example():
    assert BLOCKS, "README.md shows no python"


@pytest.mark.parametrize("line", BLOCKS)
def test_block(line):
    if "cuda" in BLOCKS[line] and not torch.cuda.is_available():
        pytest.skip("no CUDA device")
    # Empty lines in front: a traceback then names README's own line.
    code = compile("\n" * line + BLOCKS[line], str(README), "exec")
    exec(code, {"__name__": "__main__"})
