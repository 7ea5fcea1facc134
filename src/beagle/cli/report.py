"""``beagle report``: tables and plots from result files."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from beagle.cli import options as o


def report(
    results: Annotated[list[Path], typer.Argument(help="Files that `beagle eval --json` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the report.")],
) -> None:
    """Write report.md and its plots as PNG and SVG. Single answers: `beagle view`.

    Example: [bold]beagle report results/paper.json --out report[/bold]
    """
    from beagle.evaluation.report.write import write_report

    o.console.print(f"wrote {write_report(results, out)}", highlight=False, soft_wrap=True)
