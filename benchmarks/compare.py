"""Op libraries side by side: `python -m benchmarks compare OLD.so NEW.so ...`.

How tuning is chosen. One process can hold one library, so each is measured in processes of its own,
in turn, beside the same limit. Calls go through torch.ops, since _C belongs to one op library: on a
CPU a small call's time is mostly its way.
"""

import argparse
import shutil
import tempfile
from pathlib import Path
from typing import Any

from merge_attn_states._library import OP_LIBRARY

from . import options
from .process import joined, passed_on, run_processes
from .results import ratio
from .tables import markdown, number, spread


def with_library(library: Path, folder: Path) -> Path:
    """A copy of the package with that op library, and without _C, which belongs to another."""
    package = OP_LIBRARY.parent
    ignored = shutil.ignore_patterns("*.so", "__pycache__")
    shutil.copytree(package, folder / package.name, ignore=ignored)
    shutil.copy(library, folder / package.name / OP_LIBRARY.name)
    return folder


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks compare", description=__doc__)
    parser.add_argument("libraries", type=Path, nargs="+", metavar="LIBRARY", help="two or more")
    options.add_measuring(parser)
    parser.add_argument("--turns", type=options.positive, default=3, help="processes of each")
    chosen = parser.parse_args(arguments)
    if len(chosen.libraries) < 2 or not all(path.is_file() for path in chosen.libraries):
        parser.error("LIBRARY: expected two or more files")
    chosen.only = chosen.only or ["neighbours" if chosen.device.type == "cuda" else "cpu"]
    given = [*passed_on(chosen), "--only-ours"]
    seen: list[list[Any]] = [[] for _ in chosen.libraries]
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, str(index)) for index in range(len(chosen.libraries))]
        paths = list(map(with_library, chosen.libraries, places))
        for _ in range(chosen.turns):
            for path, one in zip(paths, seen, strict=True):
                one += run_processes("benchmarks.process", given, 1, first_on_path=path)
    header = ["us", *(text for path in chosen.libraries for text in (str(path), "over the limit"))]
    for group in options.groups(chosen):
        each = [joined([answer["groups"][group] for answer in one]) for one in seen]
        limit = "add" if group == "cpu" else "limit"
        rows = []
        for records in zip(*each, strict=True):
            rows.append([records[0]["case"]])
            for one in records:
                rows[-1] += [spread(one, "ours"), number(ratio(one, "ours", limit), 3)]
        print(f"\n{group}\n{markdown(header, rows)}")
    return 0
