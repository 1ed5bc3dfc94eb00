"""The pictures: how often the limit's time goes into that of everybody, in bars."""

from collections.abc import Callable, Iterator
from typing import NamedTuple
from xml.sax.saxutils import escape

from .results import Record, Results, ratio, time_of
from .tables import headline, megabytes, microseconds, ring_steps

WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 94, 62
FONT = "font-family='system-ui, sans-serif'"
DASHES = "stroke='#111827' stroke-width='1.5' stroke-dasharray='5 3'"
LIMIT = "1x: a kernel that only moves the bytes"


class Drawing(NamedTuple):
    """What one of the pictures shows; bars are cut at a multiple of the limit."""

    records: Callable[[Results], list[Record]]
    title: str
    bars: dict[str, tuple[str, str]]  # provider: title and colour
    caption: str
    numbers: str
    cut: float = 100.0


def many_parts(results: Results) -> list[Record]:
    """A ring's steps, and many parts: of few rows, and cold."""
    few = results.select("states", kind="list", size="64x16")
    cold = results.select("states", kind="list", size="8192x32", parts=8)
    return [*ring_steps(results), *(record for record in few if record["parts"] > 2), *cold]


OURS, COMPILED = ("merge_attn_states", "#2563eb"), ("torch.compile", "#9ca3af")
DRAWINGS = {
    "benchmarks.svg": Drawing(
        headline,
        "What a merge adds between two other kernels, {}: shorter is faster",
        {"ours": OURS, "vllm": ("vLLM", "#f59e0b"), "compile": COMPILED},
        "tokens x heads, bfloat16, D = 128",
        "on the bars: microseconds added",
    ),
    "benchmarks-states.svg": Drawing(
        many_parts,
        "A ring's step and many parts, {}: shorter is faster",
        {
            "ours": OURS,
            "flashinfer": ("FlashInfer", "#f59e0b"),
            "compile": COMPILED,
            "eager": ("eager", "#d1d5db"),
        },
        "tokens x heads, bfloat16 (a ring's state: float32), D = 128; "
        "64 x 16 between two other kernels, the others from DRAM",
        "on the bars: microseconds; cut at 6x",
        6.0,
    ),
}


def svg(results: Results, drawing: Drawing) -> str:
    """The picture; the same results give the same text."""
    records = drawing.records(results)
    shares = [ratio(record, name, "limit") or 0.0 for record in records for name in drawing.bars]
    step, bottom = (WIDTH - LEFT - RIGHT) / len(records), HEIGHT - BOTTOM
    width, most = 0.8 * step / len(drawing.bars), min(drawing.cut, max(2.0, *shares))
    scale = (bottom - TOP) / most
    title = drawing.title.format(results.gpu)
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {FONT}>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        _text(16, 26, title, 17),
        *_legend(drawing),
    ]
    for i, record in enumerate(records):
        parts += _bars(record, drawing, LEFT + (i + 0.5) * step, width, scale)
    for value in range(int(most) + 1):
        parts.append(_text(LEFT - 6, bottom - value * scale + 4, f"{value}x", 12, "end"))
    limit = f"y1='{bottom - scale:.1f}' y2='{bottom - scale:.1f}'"
    parts.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' {limit} {DASHES}/>")
    parts.append(_text(WIDTH / 2, HEIGHT - 8, drawing.caption, 12, "middle"))
    return "\n".join([*parts, "</svg>\n"])


def _bars(
    record: Record, drawing: Drawing, middle: float, width: float, scale: float
) -> Iterator[str]:
    """A size's bars around `middle`, with microseconds on them and the size below."""
    shares = {name: ratio(record, name, "limit") or 0.0 for name in drawing.bars}
    shown = [name for name, share in shares.items() if share]
    bottom, left = HEIGHT - BOTTOM, middle - len(shown) * width / 2
    for name in shown:
        top = bottom - scale * min(shares[name], drawing.cut)
        yield (
            f"<rect x='{left:.1f}' y='{top:.1f}' width='{width - 2:.1f}' "
            f"height='{bottom - top:.1f}' fill='{drawing.bars[name][1]}'/>"
        )
        us = microseconds(time_of(record, name))
        us += f" ({shares[name]:.0f}x)" if shares[name] > drawing.cut else ""
        yield _text(left + width / 2 - 1, top - 4, us, 10, "middle")
        left += width
    below = f"{megabytes(record['bytes'])} MB"
    if record["group"] == "states":
        below = f"{record['parts']} parts" if record["kind"] == "list" else record["kind"]
    yield _text(middle, bottom + 18, record["size"].replace("x", " x "), 13, "middle")
    yield _text(middle, bottom + 34, below, 11, "middle")


def _legend(drawing: Drawing) -> Iterator[str]:
    x = 16
    for title, colour in drawing.bars.values():
        yield f"<rect x='{x}' y='42' width='12' height='12' fill='{colour}'/>"
        yield _text(x + 17, 53, title, 13)
        x += 44 + 8 * len(title)
    yield f"<line x1='{x}' x2='{x + 24}' y1='48' y2='48' {DASHES}/>"
    yield _text(x + 30, 53, LIMIT, 13)
    yield _text(16, 72, drawing.numbers, 11)


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    where = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}'"
    return f"<text {where} fill='#374151'>{escape(text)}</text>"
