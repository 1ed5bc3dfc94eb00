"""README's picture: what a merge adds between two kernels, as a multiple of the limit, in bars."""

from collections.abc import Iterator
from xml.sax.saxutils import escape

from .results import Record, Results, ratio, time_of
from .tables import headline, megabytes, microseconds

BARS = {  # provider: title and colour
    "ours": ("merge_attn_states", "#2563eb"),
    "vllm": ("vLLM", "#f59e0b"),
    "compile": ("torch.compile", "#9ca3af"),
}
WIDTH, HEIGHT = 860, 400
LEFT, RIGHT, TOP, BOTTOM = 46, 16, 94, 62
FONT = "font-family='system-ui, sans-serif'"
DASHES = "stroke='#111827' stroke-width='1.5' stroke-dasharray='5 3'"


def svg(results: Results) -> str:
    """The picture; the same results give the same text."""
    records = headline(results)
    shares = [ratio(record, name, "limit") or 0.0 for record in records for name in BARS]
    scale = (HEIGHT - TOP - BOTTOM) / max(2.0, *shares)
    title = f"What a merge adds between two other kernels, {results.gpu}: shorter is faster"
    step, bottom = (WIDTH - LEFT - RIGHT) / len(records), HEIGHT - BOTTOM
    parts = [
        f"<svg xmlns='http://www.w3.org/2000/svg' viewBox='0 0 {WIDTH} {HEIGHT}' {FONT}>",
        f"<title>{escape(title)}</title>",
        f"<rect width='{WIDTH}' height='{HEIGHT}' fill='white'/>",
        _text(16, 26, title, 17),
        *_legend(),
    ]
    for i, record in enumerate(records):
        parts += _bars(record, LEFT + i * step, step, scale)
    for value in range(int(max(2.0, *shares)) + 1):
        parts.append(_text(LEFT - 6, bottom - value * scale + 4, f"{value}x", 12, "end"))
    limit = f"y1='{bottom - scale:.1f}' y2='{bottom - scale:.1f}'"
    parts.append(f"<line x1='{LEFT}' x2='{WIDTH - RIGHT}' {limit} {DASHES}/>")
    parts.append(_text(WIDTH / 2, HEIGHT - 8, "tokens x heads, bfloat16, D = 128", 12, "middle"))
    return "\n".join([*parts, "</svg>\n"])


def _bars(record: Record, x: float, step: float, scale: float) -> Iterator[str]:
    """A size's bars, from `x` on, with microseconds on them and the size below."""
    bottom, width = HEIGHT - BOTTOM, 0.8 * step / len(BARS)
    for i, (name, (_, colour)) in enumerate(BARS.items()):
        height, left = scale * (ratio(record, name, "limit") or 0.0), x + 0.1 * step + i * width
        if height:
            yield (
                f"<rect x='{left:.1f}' y='{bottom - height:.1f}' width='{width - 2:.1f}' "
                f"height='{height:.1f}' fill='{colour}'/>"
            )
            us = microseconds(time_of(record, name))
            yield _text(left + width / 2 - 1, bottom - height - 4, us, 10, "middle")
    yield _text(x + step / 2, bottom + 18, record["size"].replace("x", " x "), 13, "middle")
    yield _text(x + step / 2, bottom + 34, f"{megabytes(record['bytes'])} MB", 11, "middle")


def _legend() -> Iterator[str]:
    x = 16
    for title, colour in BARS.values():
        yield f"<rect x='{x}' y='42' width='12' height='12' fill='{colour}'/>"
        yield _text(x + 17, 53, title, 13)
        x += 44 + 8 * len(title)
    yield f"<line x1='{x}' x2='{x + 24}' y1='48' y2='48' {DASHES}/>"
    yield _text(x + 30, 53, "1x, the limit: a kernel that only moves the bytes", 13)
    yield _text(16, 72, "on the bars: microseconds added", 11)


def _text(x: float, y: float, text: str, size: int, anchor: str = "start") -> str:
    where = f"x='{x:.1f}' y='{y:.1f}' font-size='{size}' text-anchor='{anchor}'"
    return f"<text {where} fill='#374151'>{escape(text)}</text>"
