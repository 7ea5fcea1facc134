"""Plots of a side-by-side run, and of ``beagle profile``."""

from __future__ import annotations

from collections.abc import Mapping
from math import ceil
from pathlib import Path
from typing import Any

from beagle.evaluation.figures import resolved
from beagle.evaluation.report import style
from beagle.evaluation.report.style import COLOURS, DASHED, INK, MARKS, PART_COLOURS, new_figure, save
from beagle.evaluation.report.tables import heading, machine, over_plain, parts_of, per_pass, questions

OFTEN = 10  # a share of fewer trials is noise


def plots(result: Mapping[str, Any], folder: Path, prefix: str = "") -> list[str]:
    """Write every plot that the result has figures for, as PNG and SVG; their names without endings."""
    names = []
    for name, draw in (("speed_up", speed_up), ("step_alpha", step_alpha), ("iteration", iteration)):
        figure = draw(result)
        if figure is not None:
            names.append(f"{prefix}{name}")
            save(figure, folder / f"{prefix}{name}.png", folder / f"{prefix}{name}.svg")
    return names


def speed_up(result: Mapping[str, Any]) -> Any:
    """Bars of each mode's speed-up, a panel a set, with spread and the cost model's expectation."""
    parts = parts_of(result)
    modes = [mode for mode in result["modes"] if mode != "plain" and over_plain(result, mode)]
    if not modes:
        return None
    columns = {1: 1, 2: 2, 4: 2}.get(len(parts), 3 if len(parts) <= 6 else 4)
    rows = ceil(len(parts) / columns)
    size = (max(6.5, 3.9 * columns), 1.15 + rows * (0.75 + 0.46 * len(modes)))
    figure, axes = new_figure(columns, rows, size=size, share_y=True)
    reach = 1.0
    for axis, (name, part) in zip(axes, parts.items(), strict=False):
        for y, mode in enumerate(modes):
            ratio = over_plain(part, mode)
            expected = part["modes"].get(mode, {}).get("expected_speed_up", 0.0)
            if ratio:
                reach = max(reach, ratio["high"], ratio["pooled"], expected)
                _speed_up_bar(axis, y, COLOURS[mode], ratio, expected)
        axis.axvline(1, color=INK, linewidth=0.9, linestyle=DASHED)
        axis.set_title(f"{name}, {questions(part)} questions")
    for n, axis in enumerate(axes):
        axis.set_visible(n < len(parts))
        axis.set_xlim(0, reach * 1.42)
        style.label_rows(axis, modes)
        if n + columns >= len(parts):  # none below it
            axis.set_xlabel("speed over plain decoding (dashed: 1×)", fontsize=9)
    what = (
        "Bar: pooled, line: 10th to 90th percentile of questions, hatched: not resolved, ◇: expected by the cost model."
    )
    style.add_heading(figure, "Speed-up over plain decoding", f"{heading(result)}. {what}")
    return figure


def _speed_up_bar(axis: Any, y: int, colour: str, ratio: Mapping[str, Any], expected: float) -> None:
    sure = resolved(ratio)
    fill = {"color": colour} if sure else {"color": "none", "hatch": "////"}
    axis.barh(y, ratio["pooled"], 0.6, edgecolor=colour, linewidth=0.8, **fill)
    style.spread_line(axis, y, ratio["low"], ratio["high"])
    if expected:
        axis.plot(expected, y, "D", color="white", markeredgecolor=INK, markersize=5.5, zorder=4)
    text = f"{ratio['pooled']:.2f}×" if sure else f"not resolved:\n{ratio['low']:.2f} to {ratio['high']:.2f}"
    end = max(ratio["high"], ratio["pooled"], expected)
    style.note(axis, end, y, text, **({"fontweight": "bold"} if sure else {"fontsize": 7.5}))


def step_alpha(result: Mapping[str, Any]) -> Any:
    """Acceptance by depth, a line a mode."""
    lines = {mode: sure for mode, m in result["modes"].items() if mode != "plain" and (sure := well_tried(m))}
    if not lines:
        return None
    figure, (axis,) = new_figure(size=(7.2, 4.4))
    for n, (mode, alphas) in enumerate(lines.items()):
        depths = range(1, len(alphas) + 1)
        axis.plot(depths, alphas, color=COLOURS[mode], marker=MARKS[n % len(MARKS)], linewidth=2, label=mode)
    axis.set_xticks(range(1, max(map(len, lines.values())) + 1))
    axis.set_ylim(0, 1.03)
    axis.grid(axis="y")
    axis.set_xlabel("depth j in the draft")
    axis.set_ylabel("step-α: accepted at depth j, given depth j−1")
    style.add_legend(axis)
    style.add_heading(figure, "Acceptance by depth", f"{heading(result)}. Depths tried at least {OFTEN} times.")
    return figure


def well_tried(m: Mapping[str, Any]) -> list[float]:
    """The step-α of depths that were tried often enough to show."""
    at = {int(depth): times for depth, times in m["accepted_at_depth"].items()}
    tried = [sum(times for depth, times in at.items() if depth >= j) for j in range(len(m["step_alpha"]))]
    return [alpha for alpha, times in zip(m["step_alpha"][:8], tried, strict=False) if times >= OFTEN]


def iteration(result: Mapping[str, Any]) -> Any:
    """What one iteration costs, by part, a stacked bar a mode."""
    bars = {mode: parts for mode, m in result["modes"].items() if (parts := per_pass(m))}
    if not bars:
        return None
    figure, (axis,) = new_figure(size=(8.2, 1.95 + 0.5 * len(bars)))
    _iteration(axis, result, bars)
    style.add_heading(figure, "Where an iteration's time goes", heading(result))
    return figure


def _iteration(axis: Any, result: Mapping[str, Any], bars: Mapping[str, dict[str, float]]) -> None:
    notes = {}
    for mode, parts in bars.items():
        tau, whole = result["modes"][mode]["tau"], sum(parts.values())
        notes[mode] = f"{whole:.1f} ms for {tau:.2f} tokens:\n{whole / tau:.1f} ms a token"
    style.stacked_bars(axis, bars, notes)


def profile(result: Mapping[str, Any], path: Path) -> None:
    """Write the plot of ``beagle profile``: passes against their roofline, and an iteration's time."""
    bars = {mode: per_pass(m) for mode, m in result["modes"].items()}
    figure, (left, right) = new_figure(2, size=(13.0, 4.6))
    _passes(left, result["passes"])
    _iteration(right, result, bars)
    right.axvline(result["passes"][0]["floor_ms"], color=INK, linewidth=1.2, linestyle=DASHED)
    rates = result["rates"]
    where = f"reads {rates['bandwidth'] / 1e9:.0f} GB/s, multiplies {rates['matrix_rate'] / 1e9:.0f} GFLOP/s"
    run = (
        f"{heading(result)}. {machine(result)}. Measured: {where}. Right, dashed: the roofline of a pass of one token."
    )
    if "model" in result:
        model = result["model"]
        run += f" Speed-up {model['achieved_speed_up']:.2f}×, expected {model['expected_speed_up']:.2f}×."
    style.add_heading(figure, "Against the machine's limits", run)
    save(figure, path)


def _passes(axis: Any, passes: list[dict[str, float]]) -> None:
    tokens, measured, least = ([p[name] for p in passes] for name in ("rows", "ms", "floor_ms"))
    axis.plot(tokens, measured, color=PART_COLOURS["verify"], marker="o", linewidth=2, label="measured")
    axis.plot(tokens, least, color=INK, linewidth=2, linestyle=DASHED, label="roofline")
    axis.fill_between(tokens, least, measured, color=PART_COLOURS["verify"], alpha=0.10, linewidth=0)
    for n in sorted({0, len(tokens) // 2, len(tokens) - 1}):
        text = f"{measured[n] / least[n]:.1f}×"
        axis.annotate(text, (tokens[n], measured[n]), (0, 8), textcoords="offset points", ha="center", fontsize=9)
    axis.set_xscale("log", base=2)
    axis.set_xticks(tokens, [f"{n:g}" for n in tokens])
    axis.minorticks_off()
    axis.set_ylim(0, 1.15 * max(*measured, *least))
    axis.grid(axis="y")
    axis.set_xlabel("tokens of a pass: root and candidates")
    axis.set_ylabel("milliseconds")
    axis.set_title("a pass of the target, and how many times its roofline")
    axis.legend(loc="upper left")
