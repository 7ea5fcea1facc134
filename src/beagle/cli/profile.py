"""``beagle profile``: a pass against the machine's limits, and where an iteration's time goes."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from beagle.cli import options as o
from beagle.cli.tables import follow
from beagle.errors import BeagleError
from beagle.evaluation.records import Record
from beagle.files import write_json


@o.with_setup
def profile(
    *,
    questions: Annotated[
        list[str] | None, typer.Option(help="Question file, .jsonl (repeatable); without it, the quick suite.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, help="Questions of each file.")] = 4,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2)] = 128,
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    plot: Annotated[Path | None, typer.Option(help="Write the plot here: .png, .svg or .pdf.")] = None,
    setup: o.Setup,
) -> None:
    """The roofline of a pass here, its measured time, and where the rest of an iteration goes.

    Measures how fast this machine reads memory and multiplies matrices, times passes by number of tokens, then
    answers questions plainly and with drafts, taking turns. What each line means: docs/performance.md.

    Example: [bold]beagle profile --dtype bfloat16 --json profile.json --plot profile.png[/bold]
    """
    from beagle.evaluation.modes import Options
    from beagle.evaluation.profile import Profile
    from beagle.evaluation.report import plots, style
    from beagle.evaluation.suites import load_questions, load_suite
    from beagle.meta import command_line, describe, redact_paths

    for path in (json, plot):
        if path is not None:
            o.check_writable(path)
    if plot is not None:
        if plot.suffix not in (".png", ".svg", ".pdf"):
            raise BeagleError(f"--plot '{plot}': the name must end in .png, .svg or .pdf")
        style.require_matplotlib()
    sets = load_questions(questions, limit) if questions else load_suite("quick", limit)
    model = setup.load_model()
    with o.console.status("measuring memory, products, passes and drafts, half a minute"):
        work = Profile(model, Options(max_new_tokens, exact=setup.exact_of(model.target)))
    records: list[Record] = []
    for part in follow(work.run(sets), sum(map(len, sets.values()))):
        records += part
    with o.console.status("measuring memory, products and passes once more"):
        work.measure_again()
    result = work.result(records)
    result["meta"] = {
        **describe(model.target, [model.drafter]),
        "command": command_line(),
        "arguments": {
            "questions": [redact_paths(name) for name in questions or ["quick"]], "limit": limit,
            "max_new_tokens": max_new_tokens, "temperature": 0.0, **setup.arguments(),
        },
    }  # fmt: skip
    if json is not None:
        write_json(json, result)
    if plot is not None:
        plots.profile(result, plot)
    show_profile(result)


def show_profile(result: dict[str, Any]) -> None:
    """Both tables, and the sentences that sum them up."""
    from beagle.evaluation.profile import CONTEXT
    from beagle.evaluation.report.table import Table
    from beagle.evaluation.report.tables import PARTS, parts_table, per_pass

    console = Console()
    rates, now = result["rates"], result["rates_now"]
    console.print(
        f"this machine reads {rates['bandwidth'] / 1e9:.1f} GB/s and multiplies {rates['matrix_rate'] / 1e9:.0f} "
        f"GFLOP/s in {result['meta']['target']['dtype']} at its best since it started, {now['bandwidth'] / 1e9:.1f} GB/s and "
        f"{now['matrix_rate'] / 1e9:.0f} GFLOP/s now",
        highlight=False, soft_wrap=True,
    )  # fmt: skip
    names = ("ms", "floor_ms", "read_ms", "compute_ms")
    rows = [
        [str(p["rows"]), *(f"{p[name]:.2f}" for name in names), f"{p['ms'] / p['floor_ms']:.1f}×"]
        for p in result["passes"]
    ]
    header = ["tokens", "ms", "roofline ms", "read ms", "compute ms", "over roofline"]
    console.print(Table(f"a pass after {CONTEXT} tokens", header, rows).rich())
    if result["parts"]:
        header, rows = parts_table(result["parts"])
        console.print(Table("parts of a native pass, ms", header, rows).rich())
    rows = []
    for mode, m in result["modes"].items():
        if parts := per_pass(m):
            text = 1000 * m["text_seconds"] / m["passes"]
            cells = [f"{ms:.2f}" for ms in (*parts.values(), sum(parts.values()), m["tau"])]
            rows.append([mode, *cells, f"{m['outside_share']:.1%}", f"{text:.2f}", f"{m['tokens_per_second']:.1f}"])
    header = ["mode", *PARTS, "sum", "τ", "outside", "text", "token/s"]
    console.print(Table("an iteration, ms", header, rows).rich())
    if "model" in result:
        against = result["model"]
        console.print(
            f"speed-up {against['achieved_speed_up']:.2f}×, {against['share']:.0%} of the {against['expected_speed_up']:.2f}× "
            f"that the cost model expects (a whole draft takes {result['draft_ms']:.2f} ms)",
            highlight=False,
        )
    note = (
        "outside: share of an iteration that is neither draft nor verify. text: tokenising and putting text together, "
        "no part of the speeds."
    )
    console.print(f"[dim]{note}[/dim]", highlight=False)
