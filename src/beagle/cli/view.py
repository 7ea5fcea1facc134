"""``beagle view``: one answer of a result, its tokens coloured by where they came from."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console
from rich.rule import Rule

from beagle.evaluation.records import read_records, read_result
from beagle.evaluation.report.answer import coloured_turns, find_record, legend


def view(
    result: Annotated[Path, typer.Argument(help="File that `beagle eval --json` wrote.")],
    question: Annotated[str, typer.Option("--question", "-q", help="Its id (SET/ID where sets share ids).")],
    mode: Annotated[str | None, typer.Option(help="Whose answer; the first drafting mode unless named.")] = None,
) -> None:
    """Show an answer token by token: the target's own, or accepted at which depth of the draft.

    Example: [bold]beagle view results/paper.json --question mt_bench-81 --mode beagle[/bold]
    """
    content = read_result(result)
    record = find_record(read_records(result, content), question, mode)
    asked = {(q["set"], q["id"]): q["turns"] for q in content.get("questions", [])}
    turns = asked.get((record.set, record.id), [""] * len(record.turns))
    console = Console()
    console.print(legend())
    for text, answer in zip(turns, coloured_turns(record), strict=False):
        console.print(Rule(style="dim"))
        console.print(text, style="bold", markup=False, highlight=False)
        console.print()
        console.print(answer)
    stats = record.stats
    console.print(Rule(style="dim"))
    console.print(
        f"[dim]{record.mode}: {stats.tokens} tokens, {stats.passes} passes, τ {stats.tau:.2f}, "
        f"{stats.tokens_per_second:.1f} token/s[/dim]",
        highlight=False,
    )
