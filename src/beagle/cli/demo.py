"""``beagle demo``: the same questions answered plainly and with drafts, side by side."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from beagle.cli import options as o
from beagle.cli.chat import coloured_piece
from beagle.decoding.stats import Stats, pooled
from beagle.errors import BeagleError, BeagleInternalError
from beagle.evaluation.report.table import Table

QUESTIONS = (
    "Natalia has 12 boxes with 8 pencils each. She gives away 30 pencils. How many are left? Explain step by step.",
    "Write a Python function that returns the n-th Fibonacci number, and explain it.",
    "What should I see on a three-day trip to Rome?",
)


def demo(
    target: o.TargetName = "smollm2-135m",
    draft: o.DraftName = "auto",
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2)] = 128,
    dtype: o.DType = "float32",
    device: o.Device = "auto",
    fast: Annotated[bool, typer.Option("--fast", help="Not the bit-exact mode: faster, near-ties may flip.")] = False,
) -> None:
    """Answer three questions twice, plainly and with the draft head, and compare.

    In float32 the texts are equal as it is. In half precision (--dtype bfloat16) both sides run in the
    shape-stable mode, so that equal means bit for bit; what that costs is printed too.

    Example: [bold]beagle demo --dtype bfloat16[/bold]
    """
    model = o.load_model(target, draft, dtype=dtype, device=device)
    if model.drafter is None:
        raise BeagleError(f"no draft head for {target}; pass --draft FOLDER (see `beagle train`)")
    console = Console()
    half = str(model.target.dtype) != "torch.float32"
    exact = o.exact_of(model.target, half and not fast)
    name = str(model.target.dtype).removeprefix("torch.")
    console.print(
        f"[bold]{target}[/bold], {name}{', exact mode' if exact else ''}, greedy, {max_new_tokens} new tokens"
    )
    model.generate("Hello", max_new_tokens=8, exact=exact)  # warm-up, and the machine's costs
    totals = {"plain": Stats(), "Beagle": Stats()}
    same = 0
    rows = []
    for question in QUESTIONS:
        console.print(f"\n[bold]{question}[/bold]")
        ids: dict[str, list[int]] = {}
        stats = {mode: Stats() for mode in totals}
        for mode in totals:
            console.print(f"[cyan]{mode}[/cyan]", end=" ")
            ids[mode] = []
            for piece in model.stream(
                question, max_new_tokens=max_new_tokens, exact=exact, draft=mode == "Beagle", stats=stats[mode]
            ):
                ids[mode] += piece.token_ids
                console.print(coloured_piece(model, piece), end="", soft_wrap=True, highlight=False)
            console.print(f"\n[dim]{stats[mode].tokens_per_second:.1f} token/s[/dim]", highlight=False)
            totals[mode].add(stats[mode])
        equal = ids["plain"] == ids["Beagle"]
        same += equal
        rows.append([question[:48] + "…", *row(stats["plain"], stats["Beagle"]), "yes" if equal else "no"])
    rows.append(["all", *row(totals["plain"], totals["Beagle"]), f"{same} of {len(QUESTIONS)}"])
    header = ["question", "plain token/s", "Beagle token/s", "speed-up", "τ", "same text"]
    console.print()
    console.print(Table("the same text, faster", header, rows).rich())
    console.print("[dim]green: drafted and accepted; τ: tokens per pass of the target, 1 without drafts[/dim]")
    if exact:
        usual = pooled(model.generate(asked, max_new_tokens=max_new_tokens, draft=False).stats for asked in QUESTIONS)
        console.print(
            f"Exact mode pays for its fixed shapes: plain decoding without them makes {usual.tokens_per_second:.1f} token/s "
            "here (see beagle demo --fast).",
            highlight=False,
        )
    if same < len(QUESTIONS) and not fast and (exact or not half):
        raise BeagleInternalError("the two texts differ, which must not happen; please report this")


def row(plain: Stats, beagle: Stats) -> tuple[str, str, str, str]:
    a, b = plain.tokens_per_second, beagle.tokens_per_second
    return f"{a:.1f}", f"{b:.1f}", f"{b / a:.2f}×" if a else "-", f"{beagle.tau:.2f}"
