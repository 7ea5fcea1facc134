"""The page of all items: verdicts first, then each one's tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beagle.evaluation.records import read_records, read_result
from beagle.evaluation.report import answer
from beagle.evaluation.report.page import Section, html, markdown
from beagle.evaluation.report.tables import Table, heading, machine, tables
from beagle.research.compare.results import Entry, entries
from beagle.research.compare.suites import Finding
from beagle.research.compare.write import ran
from beagle.research.reproduce.experiments import ITEMS, Item
from beagle.research.reproduce.runner import read_findings
from beagle.research.reproduce.tables import papers_table

TITLE = "The paper's tables and figures, repeated"


def write_index(out: Path, command: str, about: str, notes: str) -> list[Path]:
    """``index.md`` and ``index.html`` of everything finished in ``out``.

    Args:
        about: the scale, in words. notes: what a reader must know of the material.
    """
    found = {name: findings for name in ITEMS if (findings := read_findings(out / name)) is not None}
    sections = [Section("Verdicts", [line for line in (about, notes) if line], command, [verdicts(found)])]
    for name, findings in found.items():
        item = ITEMS[name]
        section = _compared(item, out / name) if item.suite else _tables(item, out / name)
        section.tables.insert(0, claims(findings))
        sections.append(section)
    written = {"index.md": markdown(TITLE, sections), "index.html": html(TITLE, sections)}
    for file, text in written.items():
        (out / file).write_text(text, encoding="utf-8")
    return [out / file for file in written]


def verdicts(found: Mapping[str, list[Finding]]) -> Table:
    rows = [
        [name, ITEMS[name].title, f"{sum(f.agrees for f in findings)} of {len(findings)}",
         "; ".join(f.claim for f in findings if not f.agrees) or "-"]
        for name, findings in found.items()
    ]  # fmt: skip
    missing = [name for name in ITEMS if name not in found]
    note = f"Not run yet: {', '.join(missing)}." if missing else ""
    return Table("Claims that agree with the paper", ["item", "what", "agree", "differ"], rows, note)


def claims(findings: list[Finding]) -> Table:
    rows = [[f.claim, f.paper, f.found, "agrees" if f.agrees else "differs"] for f in findings]
    return Table("The paper and this run", ["claim", "the paper", "found", "verdict"], rows)


def _compared(item: Item, folder: Path) -> Section:
    content: dict[str, Any] = json.loads((folder / "compare.json").read_text(encoding="utf-8"))
    named = f"{item.name}/"
    plots = {f"{named}{path.stem}": path.read_text(encoding="utf-8") for path in sorted(folder.glob("*.svg"))}
    found = entries(content["runs"], content["decoding"])
    return Section(
        f"{item.name}: {item.title}",
        [ran(content["runs"], content["meta"])],
        "",
        [heads(found, item.suite is not None and item.suite.short)],
        plots,
    )


def heads(found: Mapping[str, Entry], short: bool) -> Table:
    """A row a head: acceptance (not of ``short`` trainings), cost, and decoding under each tree."""
    trees = list(next(iter(found.values())).decoding)
    header = ["head", *([] if short else ["step-α 1…5", "expected length"]), "tokens/s of training", "peak MB"]
    header += [f"{what}, {tree} tree" for tree in trees for what in ("τ", "speed over plain")]
    rows = []
    for name, entry in found.items():
        seconds = sum(r["seconds"] for r in entry.records)
        row = [name]
        row += [] if short else [entry.alphas, f"{entry.length:.2f}"]
        row += [f"{sum(r['tokens'] for r in entry.records) / seconds:.0f}", f"{entry.memory_mb():.0f}"]
        for tree in trees:
            row += [f"{entry.decoded('tau', tree):.2f}", f"{entry.decoded('speedup', tree):.2f}×"]
        rows.append(row)
    note = "" if short else "Step-α and length: on held-out answers. "
    return Table("Heads", header, rows, note + "Peak MB: what training adds.")


def _tables(item: Item, folder: Path) -> Section:
    path = folder / "eval.json"
    result = read_result(path)
    plots = {f"{item.name}/{svg.stem}": svg.read_text(encoding="utf-8") for svg in sorted(folder.glob("*.svg"))}
    section = Section(f"{item.name}: {item.title}", [heading(result), machine(result)], "", tables(result), plots)
    section.tables.insert(0, papers_table())
    section.answers = answer.for_page(read_records(path, result), result.get("questions", []), 3)
    return section
