"""``beagle reproduce``: the paper's tables and figures at a stated scale, each with a verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from beagle.cli import options as o
from beagle.errors import BeagleError

if TYPE_CHECKING:
    from beagle.evaluation.reproduce.items import Item
    from beagle.evaluation.reproduce.scales import Scale


def reproduce(
    items: Annotated[
        list[str],
        typer.Argument(help="table1, table2, fig3, fig4, fig5, fig6, fig7, fig10, fig11, fig12, memory, or all."),
    ],
    scale: Annotated[str, typer.Option(help="tiny, small, full; full is the paper's own setting.")] = "tiny",
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of results; what is finished there is kept.")] = Path(
        "runs/reproduce"
    ),
    data: Annotated[
        Path | None, typer.Option(help="Folder of answers and states that `beagle train` left; else they are made.")
    ] = None,
    prompts: Annotated[
        Path | None, typer.Option(help="Prompts to answer, .jsonl; default: $BEAGLE_DATA/train, else the package's.")
    ] = None,
    again: Annotated[bool, typer.Option("--again", help="Forget the named items' results and heads first.")] = False,
    plan: Annotated[bool, typer.Option("--plan", help="Say what would be run, and end.")] = False,
    target: o.TargetName = "smollm2-135m",
    dtype: o.DType = "float32",
    decode_dtype: Annotated[str, typer.Option(help="The target's dtype while decoding; as --dtype.")] = "auto",
    device: o.Device = "auto",
    trust_remote_code: o.Trust = False,
) -> None:
    """The paper's tables and figures: trains what they need, says what the paper found and what is found here.

    Run again, it goes on where it stopped. Heads that several figures need are trained once.

    Examples: [bold]beagle reproduce all --scale tiny --out runs/reproduce[/bold]

    [bold]beagle reproduce fig4 fig10 --scale small --data runs/mine/data --out runs/small[/bold]
    """
    from beagle.evaluation.meta import command_line
    from beagle.evaluation.reproduce.index import write_index
    from beagle.evaluation.reproduce.items import find_items
    from beagle.evaluation.reproduce.material import find_material
    from beagle.evaluation.reproduce.scales import find_scale
    from beagle.evaluation.reproduce.session import Session

    chosen = find_items(items)
    size = find_scale(scale)
    if data and prompts:
        raise BeagleError("--data holds answers already; leave --prompts or --data out")
    material = find_material(prompts, data is not None, size.prompts, size.questions)
    for line in (f"{scale}: {size.about}", *budget(chosen, size, material.sets), material.note):
        if line:
            o.console.print(line, highlight=False)
    if plan:
        return
    o.check_writable(out / "reproduce.json")
    named = {"name": target, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    command = command_line()

    def say(line: str) -> None:
        o.console.print(line, highlight=False)

    session = Session(out, scale, size, named, decode_dtype, material, data, command, say)
    session.open()
    if again:
        session.forget(chosen)
    try:
        for item in chosen:
            o.show_findings(session.run(item))
            pages = write_index(out, command, f"Scale {scale}: {size.about}", material.note)
    except KeyboardInterrupt:
        o.console.print(f"[yellow]stopped; run the same command again to go on in {out}[/yellow]")
        raise
    o.console.print(f"written to {out}: {', '.join(path.name for path in pages)}, and a folder for each item")


def budget(items: Sequence[Item], scale: Scale, sets: dict[str, list]) -> list[str]:
    """What the items take, in words."""
    recipe = scale.recipe
    names = {v.plain_name(recipe) for item in items if not (item.suite and item.suite.short) for v in item.heads()}
    short = {v.plain_name(recipe) for item in items if item.suite and item.suite.short for v in item.heads()}
    each = (
        f"{scale.tokens:,} tokens"
        if scale.tokens
        else f"{recipe.train.early_epochs + recipe.train.late_epochs:g} epochs"
    )
    lines = []
    if names:
        lines.append(f"trains {len(names)} heads on {each} each: {', '.join(sorted(names))}")
    if short:
        lines.append(f"trains {len(short)} heads on {scale.memory_tokens:,} tokens each, for their memory")
    if decoding := [item.name for item in items if item.decodes]:
        asked = ", ".join(f"{len(prompts)} of {name}" for name, prompts in sets.items())
        lines.append(f"decodes {scale.max_new_tokens} tokens a question for {', '.join(decoding)}: {asked}")
    return lines
