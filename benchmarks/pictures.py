"""The three pictures, drawn from picture_rows.py's rows alone; the same rows give the same file."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .picture_rows import COMPARED, Row, description
from .providers import TITLES
from .tables import megabytes, microseconds

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

FORMATS = ("svg", "png")
DPI = 130
STYLE = {
    "svg.hashsalt": "merge_attn_states",
    "svg.fonttype": "path",  # a reader's fonts are not ours, and labels must not overlap
    "font.family": "DejaVu Sans",
    "font.size": 9,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.axisbelow": True,
    "axes.titlelocation": "left",
    "axes.titlesize": 10,
    "grid.color": "#e4e4e4",
    "legend.frameon": False,
}
COLORS = {  # Okabe and Ito's, told apart by everyone
    "ours": "#0072b2",
    "vllm": "#d55e00",
    "flashinfer": "#009e73",
    "compile": "#cc79a7",
    "eager": "#888888",
}
MARKERS = {"ours": "o", "vllm": "s", "flashinfer": "^", "compile": "D", "eager": "v"}
BARS = {True: ("#0072b2", "#7fb8d8"), False: ("#8c8c8c", "#c6c6c6")}  # ours or not, by GPU
GPU_COLORS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7")
SPEED_UPS = (0.25, 0.5, 0.7, 0.8, 0.9, 1, 1.1, 1.2, 1.4, 1.7, 2, 2.5, 3, 4, 6, 8)
MB = 1e6


def save(name: str, rows: Sequence[Row], folder: Path) -> list[Path]:
    """Draw a picture in every format, its rows embedded."""
    import matplotlib
    from matplotlib.figure import Figure

    paths = [folder / f"{name}.{suffix}" for suffix in FORMATS]
    with matplotlib.rc_context({**matplotlib.rcParamsDefault, **STYLE}):
        figure = Figure(layout="constrained")
        DRAW[name](figure, rows)
        for path, suffix in zip(paths, FORMATS, strict=True):
            dates = {"Date": None} if suffix == "svg" else {"Software": None}
            metadata = {"Title": name, "Description": description(rows), **dates}
            figure.savefig(path, dpi=DPI, metadata=metadata)
    return paths


def draw_limit(figure: Figure, rows: Sequence[Row]) -> None:
    """A point a case: percent of the limit over bytes; a row of panels a GPU, cold and warm."""
    from matplotlib.ticker import FuncFormatter

    gpus = sorted({row[0] for row in rows})
    shown = [one for one in reversed(COMPARED) if any(row[2] == one for row in rows)]  # ours on top
    figure.set_size_inches(11, 1.4 + 3.2 * len(gpus))
    panels = figure.subplots(len(gpus), 2, sharex=True, sharey=True, squeeze=False)
    regimes = {"cold": "inputs in DRAM (cold)", "warm": "inputs in L2 (warm)"}
    for (gpu, regime), panel in zip(
        ((gpu, regime) for gpu in gpus for regime in regimes), panels.flat, strict=True
    ):
        panel.axhline(100, color="black", linewidth=1)
        for provider in shown:
            points = [(row[3], row[4]) for row in rows if row[:3] == (gpu, regime, provider)]
            panel.plot(
                [float(moved) / MB for moved, _ in points],
                [float(percent) for _, percent in points],
                linestyle="none",
                marker=MARKERS[provider],
                color=COLORS[provider],
                markersize=5 if provider == "ours" else 4.5,
                alpha=0.85 if provider == "ours" else 0.6,
                zorder=2.5 if provider == "compile" else 2,  # three points, that others would hide
                markeredgewidth=0,
                label=TITLES[provider],
            )
        panel.set_title(f"{gpu}, {regimes[regime]}")
        panel.set_xscale("log")
        panel.xaxis.set_major_formatter(FuncFormatter(lambda x, _: f"{x:g}"))
        panel.yaxis.set_major_formatter(FuncFormatter(lambda y, _: f"{y:g}"))
        panel.grid(which="major")
    # Not before every panel is drawn: it ends the scaling of the axis that all of them share.
    panels[0, 0].set_ylim(bottom=0, top=1.05 * max(float(row[4]) for row in rows))
    for panel in panels[:, 1]:  # right of what fits into L2 nothing is warm
        panel.annotate(
            "100 %: the triad, a plain kernel that\nreads two buffers and writes one",
            (0.99, 100),
            xycoords=("axes fraction", "data"),
            xytext=(0, -4),
            textcoords="offset points",
            ha="right",
            va="top",
            fontsize=8,
        )
    for panel in panels[-1]:
        panel.set_xlabel("MB moved: two parts, the output and three LSEs, once each")
    for panel in panels[:, 0]:
        panel.set_ylabel("percent of the memory's limit")
    handles, labels = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles[::-1], labels[::-1], loc="outside upper center", ncols=len(labels))


def draw_vllm(figure: Figure, rows: Sequence[Row]) -> None:
    """A line a shape: vLLM's time over ours, a colour a GPU, filled where cold."""
    gpus = sorted({row[3] for row in rows})
    left, right = (
        _lines(rows, {"shapes": "bf16, tokens x heads x head size", "dtypes": "other dtypes"}),
        _lines(rows, {"models": "models, heads x head size on one GPU", "special": "special"}),
    )
    longest = max(len(left), len(right))
    figure.set_size_inches(13, 1.2 + 0.155 * longest)
    values = [float(row[5]) for row in rows]
    for panel, lines in zip(figure.subplots(1, 2), (left, right), strict=True):
        panel.set_xscale("log")  # half as fast is as far from 1.0 as twice as fast
        panel.set_xticks(SPEED_UPS, [f"{one:g}" for one in SPEED_UPS])
        panel.set_xticks([], minor=True)
        panel.axvspan(1e-3, 1, color="#f6f1ee", zorder=0)
        panel.axvline(1, color="black", linewidth=1)
        for place, (label, line) in enumerate(lines):
            if not line:
                panel.annotate(
                    label,
                    (0, place),
                    xycoords=("axes fraction", "data"),
                    xytext=(-4, 0),
                    textcoords="offset points",
                    ha="right",
                    va="center",
                    fontsize=7.5,
                    fontweight="bold",
                )
        for gpu, color in zip(gpus, GPU_COLORS, strict=False):
            for regime, face in (("cold", color), ("warm", "white")):
                points = [
                    (float(row[5]), place)
                    for place, (_, line) in enumerate(lines)
                    for row in line
                    if row[3:5] == (gpu, regime)
                ]
                x, y = zip(*points, strict=True) if points else ((), ())
                panel.plot(x, y, "o", color=color, markerfacecolor=face, markersize=4.5, alpha=0.9)
        places = [place for place, (_, line) in enumerate(lines) if line]
        panel.hlines(places, 0, 1, "#ececec", linewidth=0.6, zorder=0, transform=_across(panel))
        panel.set_yticks(places, [label for label, line in lines if line], fontsize=7)
        panel.tick_params(axis="y", length=0)
        panel.set_ylim(longest - 0.4, -0.6)
        panel.set_xlim(min(0.9, *values) / 1.03, max(1.2, *values) * 1.03)
        panel.grid(axis="x")
        panel.set_xlabel("vLLM's time over ours; above 1.0 ours is faster")
    _gpu_legend(figure, gpus)


def _across(panel: Axes) -> Any:
    """Horizontally the panel's width, vertically the data."""
    return panel.get_yaxis_transform()


def _lines(rows: Sequence[Row], panels: dict[str, str]) -> list[tuple[str, list[Row]]]:
    """(label, its rows) from top to bottom; a heading has no rows, and an empty line before it."""
    lines: list[tuple[str, list[Row]]] = []
    for panel, heading in panels.items():
        chosen = [row for row in rows if row[0] == panel]
        if not chosen:
            continue
        lines += [("", [])] if lines else []
        lines.append((heading, []))
        shapes = {row[1]: int(row[2]) for row in chosen}
        for label in _ordered(panel, shapes):
            size = f"{megabytes(shapes[label])} MB"
            lines.append((f"{label}   {size}", [row for row in chosen if row[1] == label]))
    return lines


def _ordered(panel: str, shapes: dict[str, int]) -> list[str]:
    if panel != "shapes":
        return list(shapes)
    return sorted(shapes, key=lambda shape: (int(shape.split("x")[2]), shapes[shape]))


def _gpu_legend(figure: Figure, gpus: Sequence[str]) -> None:
    from matplotlib.lines import Line2D

    handles = []
    for gpu, color in zip(gpus, GPU_COLORS, strict=False):
        for regime, face in (("cold", color), ("warm", "white")):
            style: dict[str, Any] = {"marker": "o", "color": color, "markerfacecolor": face}
            handles.append(Line2D([], [], linestyle="none", label=f"{gpu}, {regime}", **style))
    figure.legend(handles=handles, loc="outside upper center", ncols=len(handles))


def draw_host(figure: Figure, rows: Sequence[Row]) -> None:
    """A bar a provider and GPU: tight on the left, swept on the right."""
    gpus = sorted({row[0] for row in rows})
    providers = [one for one in TITLES if any(row[2] == one for row in rows)]
    figure.set_size_inches(11, 1.3 + 0.24 * (len(gpus) + 0.6) * len(providers))
    titles = {
        "tight": "called in a tight loop",
        "swept": "16 MB of other memory touched before each call",
    }
    thickness = 0.8 / len(gpus)
    panels = figure.subplots(1, 2, sharey=True)
    for regime, panel in zip(titles, panels, strict=True):
        for row in rows:
            if row[1] != regime:
                continue
            shade = gpus.index(row[0])
            place = providers.index(row[2]) + (shade - (len(gpus) - 1) / 2) * thickness
            median, low, high = map(float, row[3:])
            panel.barh(
                place,
                median,
                0.9 * thickness,
                color=BARS[row[2].startswith("ours")][shade % 2],
                xerr=[[median - low], [high - median]],
                error_kw={"elinewidth": 0.8, "ecolor": "#333333"},
            )
            panel.annotate(
                f"{microseconds(median)}  {row[0]}",
                (high, place),
                xytext=(4, 0),
                textcoords="offset points",
                va="center",
                fontsize=7.5,
            )
        panel.set_title(titles[regime])
        panel.set_xlabel("microseconds a call, launch included")
        panel.margins(x=0.2)
        panel.set_xlim(left=0)
        panel.grid(axis="x")
    panels[0].set_yticks(range(len(providers)), [TITLES[one] for one in providers])
    panels[0].invert_yaxis()
    for panel in panels:
        panel.tick_params(axis="y", length=0)


DRAW: dict[str, Callable[[Figure, Sequence[Row]], None]] = {
    "limit": draw_limit,
    "vllm": draw_vllm,
    "host": draw_host,
}
