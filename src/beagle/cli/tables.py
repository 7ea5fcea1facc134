"""What ``beagle bench`` and ``beagle eval`` show: progress, then tables of figures."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from rich import box
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from beagle.cli import options as o
from beagle.evaluation.records import Record

NOTE = (
    "τ: tokens per target pass after prefill, over all steps, bonus token counted. Speed-ups: quotient of the speeds "
    "(10th to 90th percentile of single questions); 'not resolved' where that spread holds 1. near-ties: answers that "
    "leave plain decoding's where the target's two best tokens were nearly equal. +MB: memory above the target. "
    "expected: speed-up by the cost model."
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

    console = Console()
    sets = result["sets"]
    parts = [*sets.items(), *([("all", result)] if len(sets) != 1 else [])]
    for name, part in parts:
        console.print(_table(name, part))
        for pair, values in part["ratios"].items():
            console.print(f"  {pair}: {speed_up_text(values)}", highlight=False)
        for category, few in part.get("categories", {}).items():
            pairs = {pair: v for pair, v in few["ratios"].items() if pair.endswith("/plain") and v.get("count", 0) > 1}
            if pairs:  # one measurement says nothing
                shown = ", ".join(f"{pair} {speed_up_text(values)}" for pair, values in pairs.items())
                console.print(f"  [dim]{category}: {shown}[/dim]", highlight=False)
    console.print(_costs(result))
    console.print(f"[dim]{NOTE}[/dim]", highlight=False)


def _table(name: str, part: dict[str, Any]) -> Table:
    questions = max(figures["questions"] for figures in part["modes"].values())
    table = new_table(f"{name} ({questions} questions)", "mode", "token/s", "τ", "step-α 1…5", "identical", "near-ties")
    for mode, m in part["modes"].items():
        alphas = " ".join(f"{a:.2f}" for a in m["step_alpha"][:5]) or "-"
        shares = ["-" if m[name] is None else f"{m[name]:.1%}" for name in ("identical", "near_ties")]
        table.add_row(mode, f"{m['tokens_per_second']:.1f}", f"{m['tau']:.2f}", alphas, *shares)
    return table


def new_table(title: str, *columns: str) -> Table:
    """A plain table; all columns but the one called mode stand at the right."""
    table = Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, padding=(0, 1, 0, 0))
    for column in columns:
        table.add_column(column, justify="left" if column == "mode" else "right", no_wrap=True)
    return table


def _costs(result: dict[str, Any]) -> Table:
    table = new_table(
        "where the time and the memory go",
        *("mode", "draft", "verify", "accept", "other", "prefill s", "peak MB", "+MB", "expected"),
    )
    for mode, m in result["modes"].items():
        table.add_row(
            mode, *time_split(m), f"{m['prefill_seconds']:.1f}", f"{m['peak_memory_mb']:.0f}",
            f"{m['memory_above_target_mb']:.0f}" if "memory_above_target_mb" in m else "-",
            f"{m['expected_speed_up']:.2f}×" if "expected_speed_up" in m else "-",
        )  # fmt: skip
    return table


def time_split(m: dict[str, Any]) -> list[str]:
    """Shares of the time after prefill; transformers' own modes don't tell theirs."""
    if not m["verify_seconds"]:
        return ["-"] * 4
    return [f"{m[f'{part}_seconds'] / m['seconds']:.0%}" for part in ("draft", "verify", "accept", "other")]
