"""The page of all items: verdicts first, then each one's tables and plots."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from beagle.evaluation.records import read_result
from beagle.evaluation.report.table import Table
from beagle.evaluation.report.tables import heading, machine, tables
from beagle.evaluation.report.write import Section, markdown
from beagle.research.compare.results import Entry, entries
from beagle.research.compare.suites import Finding
from beagle.research.compare.write import ran
from beagle.research.reproduce.experiments import ITEMS, Item
from beagle.research.reproduce.runner import read_findings
from beagle.research.reproduce.tables import papers_table

TITLE = "The paper's tables and figures, repeated"


def write_index(out: Path, command: str, about: str, notes: str) -> None:
    """Write ``index.md`` of everything finished in ``out``.

    Args:
        about: the scale, in words.
        notes: what a reader must know of the material.
    """
    found = {name: findings for name in ITEMS if (findings := read_findings(out / name)) is not None}
    sections = [Section("Verdicts", [line for line in (about, notes) if line], command, [verdicts(found)])]
    for name, findings in found.items():
        item = ITEMS[name]
        section = _compared(item, out / name) if item.suite else _tables(item, out / name)
        section.tables.insert(0, claims(findings))
        sections.append(section)
    (out / "index.md").write_text(markdown(TITLE, sections), encoding="utf-8")


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
    found = entries(content["runs"], content["decoding"])
    return Section(
        f"{item.name}: {item.title}",
        [ran(content["runs"], content["meta"])],
        "",
        [heads(found, item.suite is not None and item.suite.short)],
        _plots(item, folder),
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
    result = read_result(folder / "eval.json")
    section = Section(
        f"{item.name}: {item.title}", [heading(result), machine(result)], "", tables(result), _plots(item, folder)
    )
    section.tables.insert(0, papers_table())
    return section


def _plots(item: Item, folder: Path) -> list[str]:
    return [f"{item.name}/{path.stem}" for path in sorted(folder.glob("*.png"))]
