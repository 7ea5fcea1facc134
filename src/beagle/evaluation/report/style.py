"""How plots look: colour-blind safe (Okabe and Ito), one ink, no frame; and how they are stored."""

from __future__ import annotations

import io
import re
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INK, FAINT = "#1b1f24", "#8c959f"  # replaced in the page by its own colours, light or dark
COLOURS = {
    "plain": "#7f7f7f", "beagle": "#0072b2", "eagle": "#d55e00", "lookup": "#009e73", "small": "#cc79a7",
    "head": "#332288", "chain": "#882255", "transformers": "#a6761d", "prompt-lookup": "#56b4e9", "assisted": "#e69f00",
}  # fmt: skip
PART_COLOURS = {"draft": "#e69f00", "verify": "#0072b2", "accept": "#009e73", "other": "#7f7f7f"}
MARKS = "osD^vPX*"  # shapes tell lines apart as well

_SETTINGS: dict[str, Any] = {
    "font.size": 10, "axes.edgecolor": FAINT, "axes.labelcolor": INK, "text.color": INK, "xtick.color": INK,
    "ytick.color": INK, "axes.spines.top": False, "axes.spines.right": False, "axes.titlelocation": "left",
    "axes.titlesize": 10.5, "svg.fonttype": "path", "hatch.linewidth": 0.6, "figure.dpi": 100,
}  # fmt: skip


def new_figure(
    columns: int = 1, rows: int = 1, *, size: tuple[float, float], share_y: bool = False
) -> tuple[Figure, list[Any]]:
    """A figure and its axes, row by row."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    settings: Any = pyplot.rcParams
    settings.update(_SETTINGS)
    figure, axes = pyplot.subplots(rows, columns, figsize=size, sharey=share_y, squeeze=False, layout="constrained")
    return figure, list(axes.flat)


def title(figure: Figure, what: str, run: str) -> None:
    """What is shown, in bold, and under it what was run."""
    import textwrap

    width = int(figure.get_size_inches()[0] * 13.5)
    lines = textwrap.wrap(run, width)
    height = figure.get_size_inches()[1]
    top = 1 - 0.06 / height
    figure.text(0.012, top, what, fontsize=12.5, fontweight="bold", va="top")
    figure.text(0.012, top - 0.27 / height, "\n".join(lines), fontsize=9, color=FAINT, va="top")
    used = (0.42 + 0.17 * len(lines)) / height
    layout: Any = figure.get_layout_engine()
    layout.set(rect=(0, 0, 1, 1 - used))


def save(figure: Figure, folder: Path, name: str) -> str:
    """Write NAME.png and NAME.svg; the SVG's text, for the page."""
    import matplotlib
    from matplotlib import pyplot

    matplotlib.rcParams["svg.hashsalt"] = name  # the same file from the same figures; ids that no other plot has
    figure.savefig(folder / f"{name}.png", dpi=160, facecolor="white")
    text = io.StringIO()
    figure.savefig(text, format="svg", transparent=True, metadata={"Date": None})
    pyplot.close(figure)
    svg = text.getvalue()
    on_white = re.sub(r"(<svg [^>]*>)", r'\1<rect width="100%" height="100%" fill="#fff"/>', svg, count=1)
    (folder / f"{name}.svg").write_text(on_white, encoding="utf-8")
    return svg


def for_page(svg: str) -> str:
    """An SVG to stand in the page: no prologue, the page's ink."""
    svg = svg[svg.index("<svg") :]
    points = re.search(r'<svg [^>]*?width="([\d.]+)pt"', svg)
    widest = f' style="max-width: {float(points[1]) * 4 / 3:.0f}px"' if points else ""  # letters as large as the page's
    svg = re.sub(r'(<svg [^>]*?) ?width="[^"]*" ?', rf"\1{widest} ", svg, count=1)
    svg = re.sub(r'(<svg [^>]*?) ?height="[^"]*" ?', r"\1 ", svg, count=1)
    svg = re.sub(r"<metadata>.*?</metadata>", "", svg, flags=re.S)
    return svg.replace(INK, "currentColor").replace(FAINT, "var(--faint)").replace("#0072b2", "var(--blue)")
