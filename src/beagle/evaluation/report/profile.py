"""The plot of ``beagle profile``: a pass against its floor, and where an iteration's time goes."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beagle.evaluation.report.style import FAINT, INK, PART_COLOURS, new_figure, title
from beagle.evaluation.report.tables import PARTS, heading, machine, per_pass


def save_profile(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot; the name's ending tells the format."""
    from matplotlib import pyplot

    figure, (left, right) = new_figure(2, size=(11.5, 5.0))
    _passes(left, result["passes"])
    _iterations(right, result)
    rates = result["rates"]
    where = f"reads {rates['bandwidth'] / 1e9:.0f} GB/s, multiplies {rates['matrix_rate'] / 1e9:.0f} GFLOP/s"
    title(figure, "Against the machine's limits", f"{heading(result)}. {machine(result)}. Measured: {where}.")
    figure.savefig(path, dpi=160, facecolor="white")
    pyplot.close(figure)


def _passes(axis: Any, passes: list[dict[str, float]]) -> None:
    rows = [p["rows"] for p in passes]
    measured, least = [p["ms"] for p in passes], [p["floor_ms"] for p in passes]
    axis.plot(rows, measured, color=PART_COLOURS["verify"], marker="o", linewidth=2)
    axis.plot(rows, least, color=INK, linewidth=2, linestyle=(0, (4, 2)))
    axis.fill_between(rows, least, measured, color=PART_COLOURS["verify"], alpha=0.10, linewidth=0)
    axis.annotate("measured", (rows[-1], measured[-1]), (6, 0), textcoords="offset points", va="center", fontweight="bold", color=PART_COLOURS["verify"], annotation_clip=False)  # fmt: skip
    axis.annotate("floor", (rows[-1], least[-1]), (6, 0), textcoords="offset points", va="center", fontweight="bold", annotation_clip=False)  # fmt: skip
    for n in sorted({0, len(rows) // 2, len(rows) - 1}):
        axis.annotate(
            f"{measured[n] / least[n]:.1f}×", (rows[n], measured[n]), (0, 8), textcoords="offset points", ha="center",
            fontsize=9,
        )  # fmt: skip
    axis.set_xscale("log", base=2)
    axis.set_xticks(rows, [str(n) for n in rows])
    axis.minorticks_off()
    axis.set_xlim(rows[0] * 0.85, rows[-1] * 1.75)
    axis.set_ylim(0, 1.15 * max(*measured, *least))
    axis.grid(axis="y", color=FAINT, alpha=0.25)
    axis.set_xlabel("rows of a pass: root and candidates")
    axis.set_ylabel("milliseconds")
    axis.set_title("a pass of the target, and how many times its floor")


def _iterations(axis: Any, result: Mapping[str, Any]) -> None:
    modes = {mode: parts for mode, m in result["modes"].items() if (parts := per_pass(m))}
    longest = max(sum(parts.values()) for parts in modes.values())
    for x, (mode, parts) in enumerate(modes.items()):
        bottom = 0.0
        m = result["modes"][mode]
        for part in PARTS:
            axis.bar(x, parts[part], 0.55, bottom=bottom, color=PART_COLOURS[part], edgecolor="white", linewidth=0.8)
            if parts[part] > 0.06 * longest:
                text = f"{part} {parts[part]:.1f}"
                axis.text(x, bottom + parts[part] / 2, text, ha="center", va="center", color="white", fontsize=9)
            bottom += parts[part]
        label = f"{bottom:.1f} ms for {m['tau']:.2f} tokens\n{m['outside_share']:.1%} neither draft nor verify"
        axis.annotate(label, (x, bottom), (0, 4), textcoords="offset points", ha="center", fontsize=9)
    least = result["passes"][0]["floor_ms"]
    axis.axhline(least, color=INK, linewidth=1.2, linestyle=(0, (4, 2)))
    axis.annotate("floor of a\npass of 1 row", (len(modes) - 0.62, least), (0, 3), textcoords="offset points", fontsize=8.5)  # fmt: skip
    small = [part for part in PARTS if all(parts[part] <= 0.06 * longest for parts in modes.values())]
    axis.set_xlabel("too thin to be named: " + ", ".join(small) if small else "")
    axis.set_xticks(range(len(modes)), list(modes))
    axis.set_xlim(-0.5, len(modes) - 0.05)
    axis.set_ylim(0, 1.25 * longest)
    axis.tick_params(bottom=False)
    axis.set_ylabel("milliseconds")
    against = result.get("model")
    axis.set_title(
        f"an iteration; speed-up {against['achieved_speed_up']:.2f}×, expected {against['expected_speed_up']:.2f}×"
        if against
        else "an iteration"
    )
