"""How plots look, and how they are stored: colour-blind safe (Okabe and Ito), one ink, no frame."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from beagle.errors import BeagleError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1b1f24", "#8c959f"
COLOURS = {
    "plain": "#7f7f7f", "beagle": "#0072b2", "eagle": "#d55e00", "lookup": "#009e73", "small": "#cc79a7",
    "head": "#332288", "chain": "#882255", "transformers": "#a6761d", "prompt-lookup": "#56b4e9", "assisted": "#e69f00",
}  # fmt: skip
PART_COLOURS = {"draft": "#e69f00", "verify": "#0072b2", "accept": "#009e73", "other": "#7f7f7f"}
MARKS = "osD^vPX*"  # shapes tell lines apart as well
DASHED = (0, (4, 3))

_SETTINGS: dict[str, Any] = {
    "font.size": 10, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 10.5, "axes.axisbelow": True, "grid.color": "#e3e6ea", "legend.frameon": False,
    "svg.fonttype": "path", "hatch.linewidth": 0.6, "figure.dpi": 100,
}  # fmt: skip


def has_matplotlib() -> bool:
    """It is an extra, and takes a while to import."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    if not has_matplotlib():
        raise BeagleError("plots need matplotlib; install it: pip install 'beagle-decoding[plots]'")


def new_figure(
    columns: int = 1, rows: int = 1, *, size: tuple[float, float], share_y: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure of ``size`` inches and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = pyplot.rcParams
    settings.update(_SETTINGS)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharey=share_y, squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def add_heading(figure: Figure, what: str, run: str) -> None:
    """What is shown, in bold, and under it what was run."""
    width, height = figure.get_size_inches()
    lines = [line for part in run.splitlines() for line in textwrap.wrap(part, int(width * 13.5))]
    top = 1 - 0.06 / height
    figure.text(0.012, top, what, fontsize=12.5, fontweight="bold", va="top")
    figure.text(0.012, top - 0.27 / height, "\n".join(lines), fontsize=9, color=FAINT, va="top")
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - (0.42 + 0.17 * len(lines)) / height), wspace=0.05)


def save(figure: Figure, *paths: Path) -> None:
    """Write a figure to each path, whose ending tells the format; equal figures give equal files."""
    import matplotlib
    from matplotlib import pyplot

    for path in paths:
        matplotlib.rcParams["svg.hashsalt"] = path.stem
        metadata: Any = {"Date": None} if path.suffix == ".svg" else None
        figure.savefig(path, dpi=160, facecolor="white", metadata=metadata)
    pyplot.close(figure)


def add_legend(axis: Any) -> None:
    """Names of the lines, at the right of the axes."""
    axis.legend(loc="center left", bbox_to_anchor=(1.0, 0.5))


def label_rows(axis: Any, names: list[str]) -> None:
    """Names of horizontal bars, the first at the top."""
    axis.set_yticks(range(len(names)), names)
    axis.set_ylim(len(names) - 0.45, -0.55)
    axis.tick_params(left=False)


def note(axis: Any, x: float, y: float, text: str, **look: Any) -> None:
    """A text at the right of a point."""
    axis.annotate(text, (x, y), (6, 0), textcoords="offset points", va="center", **{"fontsize": 9, **look})


def spread_line(axis: Any, y: float, low: float, high: float) -> None:
    """The spread of a horizontal bar, with its ends marked."""
    axis.plot([low, high], [y, y], color=INK, linewidth=1.4, marker="|", markersize=7, markeredgewidth=1.4)


def stacked_bars(axis: Any, bars: Mapping[str, Mapping[str, float]], notes: Mapping[str, str]) -> None:
    """A horizontal bar for each name: milliseconds by part of an iteration; ``notes`` stand behind them."""
    longest = max(sum(parts.values()) for parts in bars.values())
    for y, (name, parts) in enumerate(bars.items()):
        left = 0.0
        for part, width in parts.items():
            label = part if y == 0 else None
            axis.barh(y, width, 0.6, left=left, color=PART_COLOURS[part], edgecolor="white", linewidth=0.8, label=label)
            if width > 0.06 * longest:
                axis.text(left + width / 2, y, f"{width:.1f}", ha="center", va="center", color="white", fontsize=9)
            left += width
        note(axis, left, y, notes[name])
    label_rows(axis, list(bars))
    axis.set_xlim(0, longest * 1.62)
    axis.set_xlabel("milliseconds of an iteration (one pass of the target and what belongs to it)")
    axis.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=len(PART_COLOURS), columnspacing=1.2, borderaxespad=0.2)
