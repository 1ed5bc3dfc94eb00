"""The examples run, and what they print is small."""

import re
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.parametrize(
    ("name", "bound"), [("merge_two_parts", 1e-5), ("train_in_two_parts", 1e-3)]
)
def test_an_example(name, bound, capsys):
    path = EXAMPLES / f"{name}.py"
    exec(compile(path.read_text(), str(path), "exec"), {})
    printed = capsys.readouterr().out
    differences = re.findall(r"(?:difference[^:]*|torch\.ops): (\S+)", printed)
    assert differences, printed
    assert all(float(difference) < bound for difference in differences), printed
