"""Runs of ``benchmarks/scaling.py`` in one file, with trends, and a plot beside it.

python benchmarks/scaling_report.py runs/scaling --json results/scaling.json
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import linear_regression
from typing import Any

from beagle.errors import BeagleError
from beagle.evaluation.report import style
from beagle.files import read_json, write_json
from beagle.meta import command_line

Run = dict[str, Any]
FIGURES: dict[str, Callable[[Run], float]] = {
    "step-α of the first draft": lambda run: float(run["step_alpha"][0]),
    "expected length": lambda run: float(run["expected_length"]),
}
LABELS = {"paper": "cross-entropy and regression", "tvce": "0.9 total variation, 0.1 cross-entropy", "lk": "LK"}
COLOURS = {"paper": "#0072b2", "tvce": "#d55e00", "lk": "#009e73"}
REMEDY = "delete it, and run again"


def read_runs(folder: Path) -> list[Run]:
    """
    Raises:
        BeagleError: none is finished, or they were scored on different answers.
    """
    runs = [read_json(path, REMEDY) or {} for path in folder.glob("*/record.json")]
    if not runs:
        raise BeagleError(f"'{folder}' holds no finished run; make some with benchmarks/scaling.py")
    if len({run["drafts"][0] for run in runs}) > 1:
        raise BeagleError(f"the runs in '{folder}' were scored on different answers; give runs of one store")
    return sorted(runs, key=lambda run: (list(LABELS).index(run["loss"]), run["answer_tokens"]))


def trend(runs: Sequence[Run], value: Callable[[Run], float]) -> dict[str, float] | None:
    """A straight line over log10 of the tokens: ``at_one + per_decade · log10(tokens)``.

    Returns:
        The line, and the largest distance of a run from it; None of one size alone.
    """
    points = [(math.log10(run["answer_tokens"]), value(run)) for run in runs]
    if len({x for x, _ in points}) < 2:
        return None
    slope, start = linear_regression(*zip(*points, strict=True))
    misses = [abs(y - start - slope * x) for x, y in points]
    return {"at_one": round(start, 5), "per_decade": round(slope, 5), "largest_miss": round(max(misses), 5)}


def on_line(line: dict[str, float], tokens: float) -> float:
    """What a trend expects of so many tokens."""
    return line["at_one"] + line["per_decade"] * math.log10(tokens)


def trends(runs: Sequence[Run]) -> dict[str, dict[str, Any]]:
    """Of each figure, over the recipe's runs: all, and those that have the recipe's own batches."""
    own = [run for run in runs if run["loss"] == "paper"]
    most = max((run["batch_tokens"] for run in own), default=0)
    large = [run for run in own if run["batch_tokens"] == most]
    return {name: {"all": trend(own, value), "large": trend(large, value)} for name, value in FIGURES.items()}


def shown(run: Run) -> Run:
    """A record without what all runs share."""
    meta = run["meta"]
    kept = {name: value for name, value in run.items() if name not in ("meta", "recipe")}
    return kept | {"date": meta["date"], "command": meta["command"]}


def plot(result: Run, path: Path) -> None:
    """Both figures against the tokens, a mark for each loss, with the trend and the head of the whole store."""
    figure, axes = style.new_figure(2, size=(13.5, 4.8))
    whole = result["whole"]
    tokens = [run["answer_tokens"] / 1e6 for run in [*result["runs"], *([whole] if whole else [])]]
    ends = min(tokens), max(tokens)
    for axis, (name, value) in zip(axes, FIGURES.items(), strict=True):
        for mark, (loss, label) in zip(style.MARKS, LABELS.items(), strict=False):
            points = [(run["answer_tokens"] / 1e6, value(run)) for run in result["runs"] if run["loss"] == loss]
            if points:
                axis.plot(*zip(*points, strict=True), mark, color=COLOURS[loss], label=label)
        if whole:
            axis.plot(max(ends), value(whole), "*", color=style.INK, markersize=12, label="head of the whole store")
        for (part, line), dashes in zip(result["trends"][name].items(), (style.DASHED, (0, (1, 2))), strict=True):
            if line:
                heights = [on_line(line, 1e6 * x) for x in ends]
                axis.plot(ends, heights, color=style.FAINT, linestyle=dashes, label=f"trend of {part} sizes")
                style.note(axis, ends[1], heights[1], f"{line['per_decade']:+.2f} per decade", color=style.FAINT)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter("{x:g}")
        axis.set_xlabel("million tokens of the target's answers")
        axis.set_title(name)
        axis.grid(axis="y")
        axis.set_xlim(0.85 * ends[0], 4 * ends[1])
    style.add_legend(axes[-1])
    first = result["runs"][0]
    about = f"{result['meta']['target']['name']}; all scored on the same {first['held_out']} held-out answers"
    style.add_heading(figure, "Acceptance against training data", about)
    style.save(figure, path)


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, help="folder that benchmarks/scaling.py filled")
    parser.add_argument("--json", type=Path, required=True, help="of the report; the plot ends beside it")
    arguments = parser.parse_args(words)
    runs = read_runs(arguments.runs)
    whole = read_json(arguments.runs / "whole.json", REMEDY)
    result = {
        "runs": [shown(run) for run in runs],
        "whole": whole and shown(whole),
        "trends": trends(runs),
        "meta": runs[-1]["meta"] | {"command": command_line("python benchmarks/scaling_report.py", words)},
    }
    write_json(arguments.json, result)
    if style.has_matplotlib():
        plot(result, arguments.json.with_suffix(".png"))
    for run in runs:
        alphas = " ".join(f"{alpha:.3f}" for alpha in run["step_alpha"])
        print(f"{run['answer_tokens']:>10,} {run['loss']:5} α {alphas}  length {run['expected_length']:.3f}")
    print(result["trends"])


if __name__ == "__main__":
    main()
