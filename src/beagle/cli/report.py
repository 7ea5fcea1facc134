"""``beagle report``: tables, plots and a page from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from beagle.cli import options as o


def report(
    results: Annotated[
        list[Path],
        typer.Argument(help="Files that `beagle eval --json` or `beagle bench --json` wrote, or a training's log.csv."),
    ],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")],
    answers: Annotated[int, typer.Option(min=0, help="Questions of each set that the page shows token by token.")] = 5,
) -> None:
    """Write report.md, report.html (one file, needs nothing else) and the plots as PNG and SVG.

    Example: [bold]beagle report results/paper.json runs/mine/log.csv --out report[/bold]
    """
    from beagle.evaluation.report.write import write_report

    for path in write_report(results, out, answers):
        o.console.print(f"wrote {path}", highlight=False, soft_wrap=True)
