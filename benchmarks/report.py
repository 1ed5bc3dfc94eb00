"""Publishes results files: README's section, docs/benchmarks.md's, and the picture beside it.

All of it follows from the files alone, so whether what is published is what they give can be
checked: --check says what is not, and the test suite asks the same.
"""

import argparse
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from . import picture
from .cases import ALL_GROUPS
from .environment import ROOT
from .results import Results
from .tables import group_tables, headline, headline_table, markdown, ring_steps, ring_table
from .targets import targets_table

RESULTS = ROOT / "benchmarks" / "results"
BEGIN, END = "<!-- benchmarks:begin -->\n", "<!-- benchmarks:end -->"
NO_RESULTS = "No GPU has measured these sources yet: `python -m benchmarks` does."


def load(paths: Iterable[Path]) -> list[Results]:
    """Results files in the order of their names, those of a GPU first."""
    return sorted(map(Results.load, sorted(paths)), key=lambda one: one.environment["gpu"] is None)


def readme(machines: Sequence[Results]) -> str:
    """One table and one picture, of the first GPU."""
    shown = next((results for results in machines if headline(results)), None)
    if shown is None:
        return f"{NO_RESULTS} [docs/benchmarks.md](docs/benchmarks.md) says how, and what of."
    return "\n\n".join(
        [
            "Microseconds that a merge adds between a kernel that writes both parts and one that "
            f"reads the output, on an {shown.gpu}, bfloat16, head size 128: the median of three "
            "processes (least-most). The limit is a kernel that reads two buffers, writes one and "
            "computes nothing.",
            markdown(*headline_table(shown)),
            "![What a merge adds, as a multiple of the limit](docs/benchmarks.svg)",
            *_ring(shown),
            f"{origin(shown)}. [docs/benchmarks.md](docs/benchmarks.md) has the recipe, every "
            "case, the host's time, the CPU, and the targets that were met and missed.",
        ]
    )


def _ring(results: Results) -> Iterator[str]:
    if ring_steps(results):
        yield (
            "A ring's step, `update_state` of a float32 state by a bfloat16 block, both from DRAM "
            "(eager is what public rings run); [the picture](docs/benchmarks-states.svg) has many "
            "parts too:"
        )
        yield markdown(*ring_table(results))


def docs(machines: Sequence[Results]) -> str:
    """Everything that was measured."""
    paragraphs = [] if any(headline(results) for results in machines) else [NO_RESULTS]
    for results in machines:
        paragraphs += [f"### {results.gpu}", f"{origin(results)}.", *_machine(results)]
    return "\n\n".join(paragraphs)


def _machine(results: Results) -> Iterator[str]:
    yield markdown(*targets_table(results)).replace("| missed |", "| **missed** |")
    for group in filter(results.select, ALL_GROUPS):
        for title, (header, rows) in group_tables(results, group):
            table = markdown(header, rows)
            head = f"<details><summary>{title}, {len(rows)} cases</summary>"
            is_open = title.endswith(("host", "merges", "layers"))
            yield table if is_open else f"{head}\n\n{table}\n\n</details>"


def origin(results: Results) -> str:
    """Machine, versions, date and sources of a results file."""
    environment, runs = results.environment, list(results.runs.values())
    clocks = runs[-1]["clocks"]
    at = f" (SM {clocks['clocks.sm']}, memory {clocks['clocks.mem']})" if clocks else ""
    named = {"driver": "driver", "torch": "PyTorch", "vllm": "vLLM", "flashinfer": "FlashInfer"}
    others = [f"{name} {environment[key]}" for key, name in named.items() if environment.get(key)]
    machine = environment["gpu"] or environment.get("cpu") or _joined(run["cpu"] for run in runs)
    trees = ", ".join(f"{tree} {str(h)[:10]}" for tree, h in environment["trees"].items())
    changed = ", with changes that are not committed" if environment["dirty"] else ""
    commits = _joined(str(run["commit"])[:10] for run in runs)
    dates = _joined(sorted(run["date"] for run in runs))
    return f"{machine}{at}, {', '.join(others)}; {dates}, commit {commits} ({trees}){changed}"


def _joined(values: Iterable[str]) -> str:
    return " and ".join(dict.fromkeys(values))


def replaced(text: str, section: str, name: str) -> str:
    """`text` with `section` between the markers."""
    before, begin, rest = text.partition(BEGIN)
    _, end, after = rest.partition(END)
    if not begin or not end:
        raise SystemExit(f"{name} lacks the markers {BEGIN.strip()} and {END}")
    return f"{before}{BEGIN}\n{section}\n\n{END}{after}"


def pages(machines: Sequence[Results], root: Path) -> Iterator[tuple[Path, str]]:
    """What each published file should hold; an empty one should not be there."""
    for name, section in (("README.md", readme), ("docs/benchmarks.md", docs)):
        yield root / name, replaced((root / name).read_text("utf-8"), section(machines), name)
    for name, drawing in picture.DRAWINGS.items():
        drawn = next((results for results in machines if drawing.records(results)), None)
        yield root / "docs" / name, picture.svg(drawn, drawing) if drawn else ""


def main(arguments: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks report", description=__doc__)
    parser.add_argument("files", type=Path, nargs="*", help="default benchmarks/results/*.json")
    parser.add_argument("--root", type=Path, default=ROOT, help="where README.md and docs/ are")
    parser.add_argument("--check", action="store_true", help="write nothing; 1 where it differs")
    options = parser.parse_args(arguments)
    differs = False
    for path, text in pages(load(options.files or RESULTS.glob("*.json")), options.root):
        if text == (path.read_text("utf-8") if path.exists() else ""):
            continue
        differs = True
        print(f"{path.name} is not what the results give" if options.check else path)
        if not options.check:
            path.write_text(text, "utf-8") if text else path.unlink()
    return int(options.check and differs)
