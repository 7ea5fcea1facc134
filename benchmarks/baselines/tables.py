"""Table and plot of a side-by-side run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from beagle.evaluation.figures import resolved, speed_up_text
from beagle.evaluation.report import style
from beagle.evaluation.report.style import DASHED, INK, new_figure, save
from beagle.evaluation.report.table import Table

COLOURS = {"transformers": "#a6761d", "Beagle": "#0072b2", "llama.cpp": "#009e73", "vLLM": "#d55e00"}


def markdown(result: dict[str, Any]) -> str:
    rows = []
    for mode, m in result["modes"].items():
        over = "1" if mode == "transformers" else speed_up_text(result["over_transformers"][mode])
        tau = f"{m['tau']:.2f}" if m["passes"] else "-"
        prefill = f"{1000 * m['prefill_seconds'] / m['questions']:.0f}"
        rows.append(
            [result["labels"][mode], f"{m['tokens_per_second']:.1f}", over, tau, prefill, f"{m['identical']:.0%}"]
        )
    rows += [[label, "not measured", why, "", "", ""] for label, why in result["not_measured"].items()]
    header = ["engine", "token/s", "over transformers' generate (spread)", "τ", "prefill, ms", "identical"]
    machine = result["meta"]["machine"]
    engines = ". ".join(sorted(set(result["meta"]["engines"].values())))
    note = (
        f"{heading(result)}. {machine['cpu']}, {machine['threads']} threads each. token/s: after the first token; spread: "
        "10th to 90th percentile of questions; identical: answers equal to our plain decoding's (quantised engines run "
        f"other weights). {engines}\n\n`{result['meta']['command']}`"
    )
    return Table("Side by side", header, rows, note).markdown()


def heading(result: dict[str, Any]) -> str:
    target, settings = result["meta"]["target"], result["meta"]["settings"]
    questions = max(m["questions"] for m in result["modes"].values())
    return f"{target['name']}, greedy, batch 1, {settings['max_new_tokens']} new tokens, {questions} questions"


def plot(result: dict[str, Any], path: Path) -> None:
    """Bars of speed over transformers' plain ``generate``, fastest first; hatched where the spread holds 1."""
    ratios = {mode: r for mode, r in result["over_transformers"].items() if r}
    order = sorted(ratios, key=lambda mode: -ratios[mode]["pooled"])
    figure, (axis,) = new_figure(size=(9.0, 1.6 + 0.42 * len(order)))
    for y, mode in enumerate(order):
        r, colour = ratios[mode], COLOURS[result["labels"][mode].partition(":")[0]]
        fill = {"color": colour} if mode == "transformers" or resolved(r) else {"color": "none", "hatch": "////"}
        axis.barh(y, r["pooled"], 0.62, edgecolor=colour, **fill)
        if mode != "transformers":
            style.spread_line(axis, y, r["low"], r["high"])
        text = f"{r['pooled']:.2f}×  ({result['modes'][mode]['tokens_per_second']:.0f} token/s)"
        style.note(axis, max(r["high"], r["pooled"]), y, text)
    axis.axvline(1, color=INK, linewidth=0.9, linestyle=DASHED)
    axis.set_xlim(0, 1.3 * max(max(r["high"], r["pooled"]) for r in ratios.values()))
    style.label_rows(axis, [result["labels"][mode] for mode in order])
    axis.set_xlabel("speed over transformers' generate (dashed: 1×)")
    shown = "Bar: pooled; line: 10th to 90th percentile of questions; hatched: the spread holds 1."
    style.add_heading(figure, "Side by side with other engines", f"{heading(result)}. {shown}")
    save(figure, path)
