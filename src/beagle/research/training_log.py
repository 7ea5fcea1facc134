"""Plots of a training's ``log.csv``, as ``beagle train`` writes it."""

from __future__ import annotations

import csv
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError
from beagle.evaluation.report.style import require_matplotlib
from beagle.research.compare.results import Entry


def plot_logs(paths: Sequence[Path], out: Path) -> list[str]:
    """Draw the courses of several trainings into ``out``.

    Returns:
        The names of the PNG files.
    Raises:
        BeagleError: a file is no log of a training, two have one name, or the folder can't be written.
    """
    require_matplotlib()
    from beagle.research.compare import plots

    entries: dict[str, Entry] = {}
    for path in paths:
        name = path.parent.name if path.stem == "log" and path.parent.name else path.stem
        if name in entries:
            raise BeagleError(f"two training logs are named '{name}'; rename one, names tell the lines apart")
        curve = read_log(path)
        entries[name] = Entry(name, [{"curve": curve, "step_alpha": curve[-1]["step_alpha"], "stages": {}}])
    about = f"{len(paths)} training{'s' * (len(paths) > 1)}, on held-out answers"
    try:
        out.mkdir(parents=True, exist_ok=True)
        return plots.draw(entries, about, out)
    except OSError as error:
        raise BeagleError(f"cannot write '{out}': {error.strerror}; choose another folder") from error


def read_log(path: Path) -> list[dict[str, Any]]:
    """A training's validations, by step; where a step was trained again after a crash, its last line counts.

    Raises:
        BeagleError: the file is no log of a training.
    """
    points: dict[int, dict[str, Any]] = {}
    try:
        with path.open(newline="", encoding="utf-8") as file:
            for row in csv.DictReader(file):
                alphas = [float(value) for name, value in row.items() if name.startswith("alpha_")]
                points[int(row["step"])] = {
                    "step": int(row["step"]),
                    "stage": row["stage"],
                    "loss": float(row["loss"]),
                    "seconds": float(row["seconds"]),
                    "tokens": int(row["tokens"]),
                    "step_alpha": alphas,
                    "expected_length": round(expected_length(alphas), 4),
                }
        if not points or not alphas:
            raise ValueError("it has no row or no column alpha_1")
    except (OSError, KeyError, ValueError, TypeError, AttributeError) as error:
        raise BeagleError(
            f"'{path}' is no training log ({getattr(error, 'strerror', None) or error}); give the log.csv of a "
            "`beagle train` run"
        ) from error
    return [points[step] for step in sorted(points)]


def expected_length(alphas: Sequence[float]) -> float:
    """1 + Σ_j Π_{i<=j} α_i: the acceptance length of chain drafts, were they independent."""
    return 1 + sum(math.prod(alphas[:j]) for j in range(1, len(alphas) + 1))
