"""From result files to a report: each is told by what it holds."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError
from beagle.evaluation.records import read_records, read_result
from beagle.evaluation.report import answer, training
from beagle.evaluation.report.page import Section, html, markdown
from beagle.evaluation.report.plots import plots
from beagle.evaluation.report.style import save
from beagle.evaluation.report.tables import heading, machine, tables

TITLE = "Beagle: speculative decoding, measured"


def write_report(paths: Sequence[Path], out: Path, answers: int = 5) -> list[Path]:
    """Write ``report.md``, ``report.html`` and the plots of all ``paths`` into ``out``.

    Args:
        paths: files of ``beagle eval`` or ``beagle bench``, comparisons of trainings, and ``log.csv``
            files. answers: questions of each set that the page shows token by token.
    Raises:
        BeagleError: a file is none of these, or the folder can't be written.
    """
    try:
        import matplotlib  # noqa: F401  (takes a while to import, and only reports need it)
    except ImportError as error:
        raise BeagleError("plots need matplotlib; install it: pip install 'beagle-decoding[plots]'") from error
    try:
        out.mkdir(parents=True, exist_ok=True)
        names = _names(paths)
        logs = {path: training.read_log(path) for path in paths if path.suffix == ".csv"}
        sections = []
        for path, name in names.items():
            if path in logs:
                figure = training.course(logs[path])
                sections.append(Section(f"Training: {logs[path].name}", plots={name: save(figure, out, name)}))
            else:
                sections.append(_section(path, out, name, answers))
        if len(logs) > 1:
            figure = training.convergence(list(logs.values()))
            sections.append(Section("Convergence", plots={"convergence": save(figure, out, "convergence")}))
        written = {"report.md": markdown(TITLE, sections), "report.html": html(TITLE, sections)}
        for file, text in written.items():
            (out / file).write_text(text, encoding="utf-8")
    except OSError as error:
        raise BeagleError(f"cannot write '{out}': {error.strerror}; choose another folder") from error
    return [out / file for file in written]


def _names(paths: Sequence[Path]) -> dict[Path, str]:
    """A prefix for each file's plots; files of one name get numbers."""
    names: dict[Path, str] = {}
    for path in paths:
        stem = f"{path.parent.name}_{path.stem}" if path.stem == "log" and path.parent.name else path.stem
        taken = sum(name == stem or name.startswith(f"{stem}-") for name in names.values())
        names[path] = f"{stem}-{taken + 1}" if taken else stem
    return names


def _section(path: Path, out: Path, name: str, answers: int) -> Section:
    try:
        content: Any = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or error
        raise BeagleError(f"result file '{path}' can't be read: {reason}; check the path") from error
    content = content if isinstance(content, dict) else {}
    if "runs" in content and "findings" in content:
        logs, needs = training.read_comparison(content, path)
        section = Section(f"Trainings compared: {path.stem}", command=content.get("meta", {}).get("command", ""))
        run = f"{len(needs)} trainings on the same answers; memory is what training adds"
        figures = {"memory": training.memory(needs, run)}
        if any(len(log.steps) > 1 for log in logs):  # a single point is no course
            figures["convergence"] = training.convergence(logs)
        for plot, figure in figures.items():
            section.plots[f"{name}_{plot}"] = save(figure, out, f"{name}_{plot}")
        return section
    result = read_result(path)
    if not result["modes"]:
        raise BeagleError(f"'{path}' holds no finished question; run its command again")
    section = Section(heading(result), [machine(result)], result["meta"].get("command", ""))
    if result["meta"].get("interrupted"):
        section.run.append("Interrupted: these are the questions finished by then.")
    section.tables = tables(result)
    section.plots = {f"{name}_{plot}": svg for plot, svg in plots(result, out, f"{name}_").items()}
    if "records" in result:
        section.answers = answer.for_page(read_records(path, result), result.get("questions", []), answers)
    return section
