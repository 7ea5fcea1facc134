"""A comparison on disk: JSON, CSV, and a page of Markdown."""

from __future__ import annotations

import csv
from collections.abc import Iterable
from pathlib import Path
from statistics import fmean
from typing import Any

from beagle.evaluation.report.table import Table
from beagle.research.compare.results import ALPHAS, Entry
from beagle.research.compare.suites import Finding


def write_csv(path: Path, rows: list[dict[str, Any]]) -> None:
    names = list(dict.fromkeys(name for row in rows for name in row))
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        writer.writerows(rows)


def run_rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A row a run: what it cost, and what it ended with."""
    rows = []
    for entry in entries:
        for i, record in enumerate(entry.records):
            names = ("variant", "seed", "window", "steps", "parameters", "bytes", "trained_steps", "tokens", "seconds")
            row: dict[str, Any] = {name: record[name] for name in names}
            for stage, figures in record["stages"].items():
                row |= {f"{stage}_{name}": value for name, value in figures.items()}
            row |= {f"alpha_{j}": alpha for j, alpha in enumerate(record["step_alpha"], 1)}
            row["expected_length"] = record["expected_length"]
            for tree, figures in entry.decoding.items():
                for name in ("tau", "tokens_per_second", "speedup", "draft_seconds", "verify_seconds", "seconds"):
                    row[f"{tree}_{name}"] = figures[i][name]
                row |= {f"{tree}_tau_{name}": part["tau"] for name, part in figures[i]["sets"].items()}
            rows.append(row)
    return rows


def curve_rows(entries: Iterable[Entry]) -> list[dict[str, Any]]:
    """A row a validation: what the plots are drawn from."""
    rows = []
    for entry in entries:
        for record in entry.records:
            for point in record["curve"]:
                row = {"variant": entry.name, "seed": record["seed"], **point}
                row |= {f"alpha_{j}": alpha for j, alpha in enumerate(row.pop("step_alpha"), 1)}
                rows.append(row)
    return rows


def spread(values: list[float], digits: int = 2) -> str:
    """Mean, and the range where there are several."""
    mean = f"{fmean(values):.{digits}f}"
    return mean if len(values) < 2 else f"{mean} ({min(values):.{digits}f} to {max(values):.{digits}f})"


def results_table(entries: dict[str, Entry]) -> Table:
    """The figures of every variant; a dash where a stage is not there."""

    def of_stages(entry: Entry, figure: str, digits: int = 0) -> str:
        values = [entry.stage(stage, figure) for stage in ("early", "late")]
        return " / ".join("-" if v is None else f"{v:.{digits}f}" for v in values)

    trees = next(iter(entries.values())).decoding
    header = ["variant", "parameters", "MB on disk", "s per million tokens, early / late", "CPU s, the same",
              "tokens/s", "peak MB, early / late", f"α 1…{ALPHAS}", "expected length"]  # fmt: skip
    header += [f"{name}, {tree} tree" for tree in trees for name in ("τ", "speed over plain")]
    rows = []
    for name, entry in entries.items():
        first = entry.records[0]
        row = [
            name, f"{entry.parameters:,}", f"{first['bytes'] / 1e6:.1f}", of_stages(entry, "seconds_per_million_tokens"),
            of_stages(entry, "cpu_seconds_per_million_tokens"),
            f"{fmean(r['tokens'] / r['seconds'] for r in entry.records):.0f}", of_stages(entry, "memory_mb"),
            entry.alphas, spread([r["expected_length"] for r in entry.records]),
        ]  # fmt: skip
        for figures in entry.decoding.values():
            row += [spread([f["tau"] for f in figures]), spread([f["speedup"] for f in figures]) + "×"]
        rows.append(row)
    return Table("", header, rows)


def iteration(figures: list[dict[str, Any]]) -> dict[str, float]:
    """Milliseconds of an iteration by part, over all seeds; ``other`` holds acceptance too."""
    passes = sum(f["passes"] for f in figures)
    draft, verify, whole = (
        1000 * sum(f[key] for f in figures) / max(1, passes) for key in ("draft_seconds", "verify_seconds", "seconds")
    )
    return {"draft": draft, "verify": verify, "other": max(0.0, whole - draft - verify)}


def time_table(entries: dict[str, Entry]) -> Table:
    """Where an iteration's time goes, in ms (paper Figure 11)."""
    rows = []
    for name, entry in entries.items():
        for tree, figures in entry.decoding.items():
            parts = iteration(figures)
            rows.append([name, tree, *(f"{part:.1f}" for part in parts.values()), f"{sum(parts.values()):.1f}"])
    return Table("", ["variant", "tree", "draft", "verify", "other", "an iteration, ms"], rows)


def claims(findings: Iterable[Finding]) -> Table:
    """What the paper says, what was found, and whether the two agree."""
    rows = [[f.claim, f.paper, f.found, "agrees" if f.agrees else "**differs**"] for f in findings]
    return Table("", ["claim", "the paper", "found", ""], rows)


def page(
    title: str, about: str, entries: dict[str, Entry], findings: list[Finding], command: str, plots: list[str]
) -> str:
    """The whole comparison as Markdown."""
    parts = [f"# {title}", about, f"`{command}`"]
    tables = [claims(findings)] if findings else []
    tables.append(results_table(entries))
    if next(iter(entries.values())).decoding:
        tables.append(time_table(entries))
    parts += [table.markdown().strip() for table in tables]
    parts += [
        "Peak MB is the highest of the steps above what the process held before training. Expected length is "
        "1 + Σ_j Π_{i≤j} α_i on validation answers, of chain drafts; τ is tokens per target pass after prefill, over "
        "all steps, bonus token counted. Seconds are of training alone; CPU seconds tell a busy machine from slow code. "
        "Brackets hold the range over seeds."
    ]
    parts += [f"![{name.removesuffix('.png')}]({name})" for name in plots]
    return "\n\n".join(parts) + "\n"
