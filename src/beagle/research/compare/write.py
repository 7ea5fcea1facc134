"""A comparison's files: figures and findings, tables, plots, a page of Markdown."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from beagle.evaluation.report.style import has_matplotlib
from beagle.files import write_json
from beagle.research.compare import plots, report
from beagle.research.compare.results import Entry, entries
from beagle.research.compare.suites import Finding, Suite


@dataclass(frozen=True)
class Written:
    """What a comparison has ended in.

    Attributes:
        plots: names of the PNG files; none where matplotlib is missing.
    """

    entries: dict[str, Entry]
    findings: list[Finding]
    plots: list[str]


def write_comparison(
    out: Path,
    records: list[dict[str, Any]],
    decoding: dict[str, Any],
    suite: Suite | None,
    meta: dict[str, Any],
    budget: str | None = None,
) -> Written:
    """Judge what was found and write ``compare.md``, ``compare.json``, ``compare.csv``, ``curves.csv``, plots.

    Args:
        decoding: figures by tree, then by ``variant/seedN`` (see ``decoding.decode``); may be empty.
        suite: what the variants are judged by; None: they are only shown.
        meta: of the run, its command among it.
        budget: in words; None: the tokens of the first record.
    """
    found = entries(records, decoding)
    findings = suite.judge(found) if suite else []
    write_json(
        out / "compare.json",
        {"meta": meta, "findings": [f.as_dict() for f in findings], "runs": records, "decoding": decoding},
    )
    report.write_csv(out / "compare.csv", report.run_rows(found.values()))
    report.write_csv(out / "curves.csv", report.curve_rows(found.values()))
    title = suite.title if suite else "Training compared"
    about = ran(records, meta, budget)
    names = []
    if has_matplotlib():
        ordered, short = (suite.ordered, suite.short) if suite else (False, False)
        names = plots.draw(found, f"{title}\n{about}", out, ordered=ordered, costs_only=short)
    text = report.page(title, about, found, findings, meta["command"], names)
    (out / "compare.md").write_text(text, encoding="utf-8")
    return Written(found, findings, names)


def ran(records: list[dict[str, Any]], meta: dict[str, Any], budget: str | None = None) -> str:
    """What was run and where, in a line."""
    machine, seeds = meta["machine"], len({record["seed"] for record in records})
    return (
        f"{Path(meta['target']['name']).name}, {budget or format(records[0]['tokens'], ',') + ' tokens'} each, "
        f"{seeds} seed{'s' * (seeds > 1)}; {machine['gpu'] or machine['cpu'].split(',')[0]}, "
        f"{machine['threads']} of {machine['cores']} cores"
    )
