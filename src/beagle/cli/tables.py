"""What ``beagle eval`` shows: progress, then tables of figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich.console import Console
from rich.progress import Progress

from beagle.cli import options as o
from beagle.evaluation.records import Record

NOTE = (
    "τ: tokens per target pass after prefill, over all steps, bonus token counted. Speed-ups: quotient of the speeds "
    "(10th to 90th percentile of single questions); 'not resolved' where that spread holds 1. near-ties: answers that "
    "leave plain decoding's where the target's two best tokens were nearly equal."
)


def follow(parts: Iterable[list[Record]], total: int, done: int = 0) -> Iterator[list[Record]]:
    """Hand on each finished question, with a bar."""
    with Progress(console=o.console) as progress:
        task = progress.add_task("questions", total=total, completed=done)
        for part in parts:
            progress.update(task, advance=1, description=part[0].set)
            yield part


def show(result: dict[str, Any]) -> None:
    """Tables of every set and of all of them."""
    from beagle.evaluation.figures import speed_up_text
    from beagle.evaluation.report.tables import costs, one_set, parts_of

    console = Console()
    for name, part in parts_of(result).items():
        console.print(one_set(name, part).rich())
        for pair, values in part["ratios"].items():
            console.print(f"  {pair}: {speed_up_text(values)}", highlight=False)
        for category, found in part.get("categories", {}).items():
            pairs = {
                pair: v for pair, v in found["ratios"].items() if pair.endswith("/plain") and v.get("count", 0) > 1
            }
            if pairs:  # one measurement says nothing
                shown = ", ".join(f"{pair} {speed_up_text(values)}" for pair, values in pairs.items())
                console.print(f"  [dim]{category}: {shown}[/dim]", highlight=False)
    console.print(costs(result).rich())
    console.print(f"[dim]{NOTE}[/dim]", highlight=False)
