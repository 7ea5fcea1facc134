"""Plots of trainings: a run's ``log.csv``, and what compared trainings need."""

from __future__ import annotations

import csv
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from operator import mul
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError
from beagle.evaluation.report.plots import spread_labels
from beagle.evaluation.report.style import COLOURS, FAINT, INK, MARKS, new_figure, title

LINES = [colour for mode, colour in COLOURS.items() if mode != "plain"]


@dataclass(frozen=True)
class Log:
    """A training's course, a row each time it was validated."""

    name: str
    steps: list[int]
    stages: list[str]
    losses: list[float]
    tokens: list[float]
    alphas: list[list[float]]

    @property
    def taus(self) -> list[float]:
        """Acceptance length of a chain with these step-α: 1 + α1 + α1 α2 + …"""
        return [1 + sum(accumulate(alphas, mul)) for alphas in self.alphas]

    def changes(self) -> list[tuple[float, str]]:
        """Where (in tokens) each stage begins."""
        found = [(0.0, self.stages[0])]
        for before, after, stage in zip(self.tokens, self.tokens[1:], self.stages[1:], strict=False):
            if stage != found[-1][1]:
                found.append(((before + after) / 2, stage))
        return found


def read_log(path: Path) -> Log:
    """
    Raises:
        BeagleError: the file is no ``log.csv`` of a training.
    """
    try:
        with path.open(newline="", encoding="utf-8") as file:
            rows = list(csv.DictReader(file))
        columns = [name for name in (rows[0] if rows else {}) if name.startswith("alpha_")]
        if not rows or not columns:
            raise ValueError("it has no row or no column alpha_1")
        name = path.parent.name if path.stem == "log" and path.parent.name else path.stem
        return Log(
            name,
            [int(row["step"]) for row in rows],
            [row["stage"] for row in rows],
            [float(row["loss"]) for row in rows],
            [float(row["tokens"]) for row in rows],
            [[float(row[column]) for column in columns] for row in rows],
        )
    except (OSError, KeyError, ValueError, TypeError) as error:
        raise BeagleError(
            f"'{path}' is no training log ({getattr(error, 'strerror', None) or error}); give the log.csv of a "
            "`beagle train` run"
        ) from error


def read_comparison(content: Mapping[str, Any], path: Path) -> tuple[list[Log], dict[str, dict[str, float]]]:
    """The courses of the runs of a `beagle research compare`, and what each variant needs.

    Raises:
        BeagleError: its runs lack what is needed.
    """
    try:
        logs: list[Log] = []
        needs: dict[str, dict[str, float]] = {}
        seeds = len({run["seed"] for run in content["runs"]})
        for run in content["runs"]:
            name = run["variant"] + (f", seed {run['seed']}" if seeds > 1 else "")
            curve: list[dict[str, Any]] = run["curve"]
            steps, stages = [p["step"] for p in curve], [p["stage"] for p in curve]
            losses, tokens = [p["loss"] for p in curve], [p["tokens"] for p in curve]
            logs.append(Log(name, steps, stages, losses, tokens, [p["step_alpha"] for p in curve]))
            memory = max(stage["memory_mb"] for stage in run["stages"].values())
            needs[name] = {"peak_mb": memory, "seconds": 1e6 * run["seconds"] / run["tokens"]}
    except (KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError) as error:
        raise BeagleError(
            f"'{path}' holds no readable comparison ({error}); give a compare.json of `beagle research compare`"
        ) from error
    return logs, needs


def course(log: Log) -> Any:
    """Loss, step-α and the τ they imply, over the tokens seen."""
    figure, axes = new_figure(3, size=(12.6, 4.3))
    seen = [tokens / 1e6 for tokens in log.tokens]
    axes[0].plot(seen, log.losses, color=LINES[0], linewidth=2, marker="o", markersize=4)
    axes[0].set_title("loss (each stage has its own)")
    depths = len(log.alphas[0])
    ends = {f"α{j + 1}": log.alphas[-1][j] for j in range(depths)}
    top = max(max(alphas) for alphas in log.alphas)
    heights = spread_labels(ends, 0.055 * max(top, 0.1))
    for j, name in enumerate(ends):
        line = [alphas[j] for alphas in log.alphas]
        axes[1].plot(seen, line, color=LINES[j % len(LINES)], linewidth=2, marker=MARKS[j % len(MARKS)], markersize=4)
        axes[1].text(seen[-1] * 1.03, heights[name], name, color=LINES[j % len(LINES)], fontweight="bold", va="center")
    axes[1].set_title("step-α on held-out answers")
    axes[2].plot(seen, log.taus, color=LINES[0], linewidth=2, marker="o", markersize=4)
    axes[2].annotate(
        f"{log.taus[-1]:.2f}", (seen[-1], log.taus[-1]), (6, 0), textcoords="offset points", va="center",
        fontweight="bold", color=LINES[0],
    )  # fmt: skip
    axes[2].set_title("τ of a chain with these step-α")
    for axis in axes:
        axis.set_xlabel("tokens seen, millions")
        axis.set_xlim(0, seen[-1] * 1.16)
        axis.grid(axis="y", color=FAINT, alpha=0.25)
        low, high = axis.get_ylim()
        axis.set_ylim(low, high + 0.1 * (high - low))
        for at, stage in log.changes():
            if at:
                axis.axvline(at / 1e6, color=FAINT, linewidth=0.9, linestyle=(0, (4, 3)))
            axis.text(
                at / 1e6 + 0.01 * seen[-1], 0.995, stage, transform=axis.get_xaxis_transform(), va="top",
                fontsize=9, color=FAINT,
            )  # fmt: skip
    title(figure, "Training", f"{log.name}: {log.steps[-1]} steps, {log.tokens[-1] / 1e6:.1f} million tokens")
    return figure


def convergence(logs: Sequence[Log]) -> Any:
    """τ of several trainings over the tokens seen, named at their ends."""
    figure, (axis,) = new_figure(size=(8.0, max(4.6, 1.2 + 0.3 * len(logs))))
    widest = max(log.tokens[-1] for log in logs) / 1e6
    lines = {f"{n}": log.taus for n, log in enumerate(logs)}
    low, high = min(map(min, lines.values())), max(map(max, lines.values()))
    heights = spread_labels({n: taus[-1] for n, taus in lines.items()}, max(high - low, 0.1) * min(0.06, 1 / len(logs)))
    for (n, taus), log in zip(lines.items(), logs, strict=True):
        colour = LINES[int(n) % len(LINES)]
        seen = [tokens / 1e6 for tokens in log.tokens]
        axis.plot(seen, taus, color=colour, linewidth=2, marker=MARKS[int(n) % len(MARKS)], markersize=4)
        axis.annotate(
            log.name, (seen[-1], taus[-1]), (widest * 1.03, heights[n]), color=colour, fontweight="bold", va="center",
            annotation_clip=False, arrowprops={"arrowstyle": "-", "color": FAINT, "linewidth": 0.6},
        )  # fmt: skip
    axis.set_xlim(0, widest * 1.4)
    bottom, top = min(low, *heights.values()), max(high, *heights.values())  # names may stand apart from their ends
    axis.set_ylim(bottom - 0.05 * (top - bottom), top + 0.05 * (top - bottom))
    axis.grid(axis="y", color=FAINT, alpha=0.25)
    axis.set_xlabel("tokens seen, millions")
    axis.set_ylabel("τ of a chain with the held-out step-α")
    title(figure, "Convergence", f"τ of {len(logs)} trainings on held-out answers over the tokens they have seen")
    return figure


def memory(settings: Mapping[str, Mapping[str, float]], run: str) -> Any:
    """Peak memory and time of training, a bar a variant."""
    figure, axes = new_figure(2, size=(10.0, 1.6 + 0.42 * len(settings)), share_y=True)
    for axis, key, label, colour in (
        (axes[0], "peak_mb", "peak memory, MB", LINES[0]),
        (axes[1], "seconds", "seconds per million tokens", LINES[1]),
    ):
        values = [row[key] for row in settings.values()]
        axis.barh(range(len(values)), values, 0.6, color=colour)
        for y, value in enumerate(values):
            axis.annotate(
                f"{value:.0f}" if value >= 100 else f"{value:.2f}", (value, y), (5, 0), textcoords="offset points",
                va="center", fontsize=9, color=INK,
            )  # fmt: skip
        axis.set_yticks(range(len(values)), list(settings))
        axis.set_ylim(len(values) - 0.45, -0.55)
        axis.set_xlim(0, max(values) * 1.18)
        axis.tick_params(left=False)
        axis.set_xlabel(label)
    layout: Any = figure.get_layout_engine()
    layout.set(wspace=0.06)  # else the last tick of one panel touches the first of the next
    title(figure, "Memory and time of training", run)
    return figure
