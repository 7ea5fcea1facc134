"""From result files to a report in Markdown, with its plots beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from beagle.errors import BeagleError
from beagle.evaluation.records import read_result
from beagle.evaluation.report.plots import plots
from beagle.evaluation.report.style import require_matplotlib
from beagle.evaluation.report.table import Table
from beagle.evaluation.report.tables import heading, machine, tables
from beagle.files import writing_to

TITLE = "Beagle: speculative decoding, measured"


@dataclass
class Section:
    """One result of a report.

    Attributes:
        run: what was run, where and how, a line each.
        command: repeats it; may be empty.
        tables: stand below the plots.
        plots: names of PNG files beside the report, without their ending.
    """

    title: str
    run: list[str] = field(default_factory=list)
    command: str = ""
    tables: list[Table] = field(default_factory=list)
    plots: list[str] = field(default_factory=list)


def markdown(title: str, sections: Sequence[Section]) -> str:
    lines = [f"# {title}", ""]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [f"{line}  " for line in section.run]
        lines += [f"`{section.command}`", ""] if section.command else [""]
        for name in section.plots:
            lines += [f"![{section.title}: {name}]({name}.png)", ""]
        for table in section.tables:
            lines += [table.markdown(), ""]
    return "\n".join(lines).rstrip() + "\n"


def write_report(paths: Sequence[Path], out: Path) -> Path:
    """Write ``report.md`` and the plots of all ``paths`` into ``out``.

    Args:
        out: a folder; made if it isn't there.
    Raises:
        BeagleError: a file is none of these, or the folder can't be written.
    """
    require_matplotlib()
    with writing_to(out):
        out.mkdir(parents=True, exist_ok=True)
        sections: list[Section] = []
        names: list[str] = []
        for path in paths:
            taken = sum(name == path.stem or name.startswith(f"{path.stem}-") for name in names)
            names.append(f"{path.stem}-{taken + 1}" if taken else path.stem)
            sections.append(_section(path, out, names[-1]))
        (out / "report.md").write_text(markdown(TITLE, sections), encoding="utf-8")
    return out / "report.md"


def _section(path: Path, out: Path, name: str) -> Section:
    if path.suffix == ".csv":
        raise BeagleError(f"'{path}' is no result of `beagle eval`; plot training logs with `beagle research plot`")
    result = read_result(path)
    if not result["modes"]:
        raise BeagleError(f"'{path}' holds no finished question; run its command again")
    run = [machine(result)]
    if result["meta"].get("interrupted"):
        run.append("Interrupted: these are the questions finished by then.")
    command = result["meta"].get("command", "")
    return Section(heading(result), run, command, tables(result), plots(result, out, f"{name}_"))
