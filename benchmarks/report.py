"""Publishes results files: README's section, docs/benchmarks.md's, and the pictures beside it.

All of it follows from the files alone, so whether what is published is what they give can be
checked: --check says what is not, and the test-suite asks the same.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from xml.etree import ElementTree

from . import sections
from .environment import ROOT, TREES, tree_hash
from .picture_rows import ROWS, description
from .pictures import FORMATS, save
from .results import Results

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->\n", "<!-- benchmarks:end -->"
SECTIONS: dict[str, Callable[[Sequence[Results]], str]] = {
    "README.md": sections.readme,
    "docs/benchmarks.md": sections.docs,
}
PICTURES = Path("docs", "benchmarks")


def load(paths: Sequence[Path]) -> list[Results]:
    """Results files in the order of their names.

    Raises
    ------
    SystemExit
        One of them is empty, or of --quick, which measures nothing.
    """
    machines = []
    for path in sorted(paths):
        results = Results.load(path)
        if results.environment.get("quick"):
            raise SystemExit(f"{path} is of --quick, which measures nothing: not published")
        if not results.runs:
            raise SystemExit(f"{path} holds no runs")
        machines.append(results)
    return machines


def replaced(text: str, section: str, name: str) -> str:
    """`text` with `section` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{name} lacks the markers {BEGIN.strip()} and {END}")
    return f"{before}{BEGIN}\n{section}\n\n{END}{after}"


def publish(machines: Sequence[Results], root: Path) -> Iterator[Path]:
    """Write sections and pictures under `root`; yields what was written."""
    for name, section in SECTIONS.items():
        path = root / name
        path.write_text(replaced(path.read_text("utf-8"), section(machines), name), "utf-8")
        yield path
    folder = root / PICTURES
    folder.mkdir(exist_ok=True)
    for name, rows in ROWS.items():
        if shown := list(rows(machines)):
            yield from save(name, shown, folder)
        else:
            for suffix in FORMATS:
                (folder / f"{name}.{suffix}").unlink(missing_ok=True)


def differences(machines: Sequence[Results], root: Path) -> Iterator[str]:
    """What under `root` is not what these results give."""
    for name, section in SECTIONS.items():
        text = (root / name).read_text("utf-8")
        if text != replaced(text, section(machines), name):
            yield f"{name} is not what the results files give"
    for name, rows in ROWS.items():
        shown = list(rows(machines))
        for suffix in FORMATS:
            path = root / PICTURES / f"{name}.{suffix}"
            if not shown:
                if path.exists():
                    yield f"{path.relative_to(root)} shows results that are not there"
            elif not path.exists():
                yield f"{path.relative_to(root)} is missing"
            elif embedded(path) != description(shown):
                yield f"{path.relative_to(root)} does not show what the results files give"


def embedded(path: Path) -> str:
    """The rows in a picture's metadata: what it was drawn from."""
    if path.suffix == ".svg":
        description_ = "{http://purl.org/dc/elements/1.1/}description"
        return next(ElementTree.parse(path).iter(description_)).text or ""
    data = path.read_bytes()
    place = data.find(b"tEXtDescription\0")
    length = int.from_bytes(data[place - 4 : place], "big")
    return data[place + 4 : place + 4 + length].partition(b"\0")[2].decode("latin-1")


def stale(results: Results) -> str:
    """How the sources measured differ from those here; empty where they are the same."""
    said = []
    for tree in TREES:
        here, there = tree_hash(ROOT / tree), results.environment["trees"][tree]
        if here != there:
            said.append(f"{tree} is {here[:10]} here, {there[:10]} was measured")
    return "; ".join(said)


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument(
        "files", type=Path, nargs="*", help="results, default benchmarks/results/*.json"
    )
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    options = parser.parse_args(arguments)
    machines = load(options.files or list(RESULTS.glob("*.json")))
    names = [results.gpu for results in machines]
    if again := {name for name in names if names.count(name) > 1}:
        raise SystemExit(f"benchmarks: more than one file is of {', '.join(again)}")
    if options.check:
        found = list(differences(machines, options.root))
        print("\n".join(found) or "published as measured")
        return int(bool(found))
    for path in publish(machines, options.root):
        print(path)
    return 0
