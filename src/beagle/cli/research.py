"""``beagle research``: trainings compared on the same answers, and the paper's tables and figures."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from beagle.cli import options as o
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.limits import MAX_NODES
from beagle.research.compare.suites import SUITES, Finding, Suite, find_suite

app = typer.Typer(
    no_args_is_help=True,
    rich_markup_mode="rich",
    help="The paper's experiments: what heads and their stages cost and bring, and its tables and figures.\n\n"
    "Example: [bold]beagle research reproduce all --scale tiny[/bold]",
)


@app.command()
def compare(
    data: Annotated[Path, typer.Option(help="Folder of answers and states, as `beagle train` leaves it (OUT/data).")],
    config: Annotated[Path, typer.Option("--config", "-c", help="Recipe, YAML: what all variants share.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the comparison; finished variants are kept.")],
    variants: Annotated[
        str | None, typer.Option(help="Comma-separated, such as beagle,beagle-early,beagle-s1..s4,eagle,eagle-u4.")
    ] = None,
    suite: Annotated[str | None, typer.Option(help=f"A comparison with a name: {', '.join(SUITES)}.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Train each variant on this many tokens.")] = None,
    seconds: Annotated[float | None, typer.Option(min=0.1, help="Or for this long, validation not counted.")] = None,
    seeds: Annotated[str, typer.Option(help="Comma-separated.")] = "0",
    validate_every: Annotated[int | None, typer.Option(min=1, help="Steps between points; default: recipe.")] = None,
    questions: Annotated[list[Path] | None, typer.Option(help="Question file to decode with (repeatable).")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions of each file.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=2)] = 128,
    target: o.TargetName = "smollm2-135m",
    dtype: o.DType = "float32",
    decode_dtype: Annotated[str, typer.Option(help="The target's dtype while decoding; as --dtype.")] = "auto",
    device: o.Device = "auto",
    tree: o.Tree = "dynamic",
    depth: o.Depth = o.PLAN.depth,
    tree_top_k: o.TreeTopK = o.PLAN.top_k,
    nodes: Annotated[int, typer.Option(min=1, max=MAX_NODES, help="Candidates of a dynamic tree, for all alike.")] = 16,
    trust_remote_code: o.Trust = False,
) -> None:
    """Train variants on the same batches; compare time, memory, acceptance. Run again, it goes on.

    Examples: [bold]beagle research compare --data runs/mine/data --config configs/default.yaml
    --suite baselines --tokens 2000000 --seeds 0,1 --out runs/baselines[/bold]

    [bold]beagle research compare --data runs/mine/data --config configs/default.yaml
    --variants beagle,eagle --seconds 600 --out runs/minutes[/bold]
    """
    from beagle.meta import command_line, describe
    from beagle.research.compare.decoding import Work, decode_once
    from beagle.research.compare.run_variants import Budget, in_fresh_process, run_all, specs
    from beagle.research.compare.variants import parse_list
    from beagle.research.compare.write import write_comparison
    from beagle.training.prompts import read_prompts
    from beagle.training.recipe import read_recipe
    from beagle.training.states import StateStore

    if (tokens is None) == (seconds is None):
        raise BeagleError("give every variant the same budget: either --tokens N or --seconds N")
    if variants and suite:
        raise BeagleError("--suite names its variants itself; leave --variants or --suite out")
    chosen: Suite | None = None if variants else find_suite(suite or "baselines")
    listed = parse_list(variants or (chosen.variants if chosen else ""))
    if chosen and chosen.trees and not questions:
        raise BeagleError(f"suite '{suite}' is about the time of decoding; give it --questions FILE")
    numbers = read_seeds(seeds)
    recipe = read_recipe(config)
    sets = {path.stem: read_prompts(path, limit=limit, skip_bad_lines=None) for path in questions or []}
    if len(sets) < len(questions or []):
        raise BeagleError("two question files have the same name; rename one, names tell the sets apart")
    kinds = chosen.trees if chosen and chosen.trees else (tree,)
    plans: dict[str, TreePlan] = {kind: o.tree_plan(kind, depth, tree_top_k, nodes) for kind in kinds}
    store = StateStore.existing(data)
    o.check_writable(out / "compare.json")
    named = {"name": target, "dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    planned = specs(listed, numbers, store, recipe, Budget(tokens, seconds), named, out, validate_every)
    try:
        records = run_all(planned, lambda line: o.console.print(line, highlight=False))
        decoding = {}
        if sets:
            heads = {f"{spec.variant}/seed{spec.seed}": spec.out / "head" for spec in planned}
            work = Work(heads, {**named, "dtype": decode_dtype}, sets, plans, max_new_tokens)
            decoding = decode_once(work, out / "decoding.json", in_fresh_process)
    except KeyboardInterrupt:
        o.console.print(f"[yellow]stopped; run the same command again to go on in {out}[/yellow]")
        raise
    meta = {
        **describe(),
        "target": records[0]["meta"]["target"],
        "command": command_line(),
        "arguments": {
            "variants": [v.name for v in listed], "suite": suite, "tokens": tokens, "seconds": seconds,
            "seeds": numbers, "validate_every": validate_every, "questions": [p.name for p in questions or []],
            "limit": limit, "max_new_tokens": max_new_tokens, "dtype": dtype, "decode_dtype": decode_dtype,
            "trees": list(plans), "depth": depth, "top_k": tree_top_k, "nodes": nodes, "config": config.name,
        },
        "data": {"tokens": store.tokens(), "shards": len(store.shards())},
    }  # fmt: skip
    written = write_comparison(out, records, decoding, chosen, meta, f"{seconds:g} s of training" if seconds else None)
    show_findings(written.findings)
    if not written.plots:
        o.console.print(
            "[yellow]no plots: pip install 'beagle-decoding\\[plots]', then run the same command again[/yellow]"
        )
    files = ["compare.md", "compare.json", "compare.csv", "curves.csv", *written.plots]
    o.console.print(f"written to {out}: {', '.join(files)}")


def read_seeds(text: str) -> list[int]:
    try:
        numbers = [int(word) for word in text.split(",")]
    except ValueError as error:
        raise BeagleError(f"--seeds '{text}' is no list of numbers; give some such as 0,1") from error
    if len(set(numbers)) < len(numbers) or min(numbers) < 0:
        raise BeagleError(f"--seeds '{text}': seeds are different and not negative; give some such as 0,1")
    return numbers


@app.command()
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

    Examples: [bold]beagle research reproduce all --scale tiny --out runs/reproduce[/bold]

    [bold]beagle research reproduce fig4 fig10 --scale small --data runs/mine/data --out runs/small[/bold]
    """
    from beagle.meta import command_line
    from beagle.research.reproduce.data import find_material
    from beagle.research.reproduce.experiments import find_items
    from beagle.research.reproduce.index import write_index
    from beagle.research.reproduce.runner import Session, budget
    from beagle.research.reproduce.scales import find_scale

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
    say = partial(o.console.print, highlight=False)
    session = Session(out, scale, size, named, decode_dtype, material, data, command, say)
    session.open()
    if again:
        session.forget(chosen)
    try:
        for item in chosen:
            show_findings(session.run(item))
            write_index(out, command, f"Scale {scale}: {size.about}", material.note)
    except KeyboardInterrupt:
        o.console.print(f"[yellow]stopped; run the same command again to go on in {out}[/yellow]")
        raise
    o.console.print(f"written to {out}: index.md, and a folder for each item")


@app.command()
def plot(
    logs: Annotated[list[Path], typer.Argument(help="Files log.csv that `beagle train` wrote.")],
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the plots.")],
) -> None:
    """Acceptance in the course of trainings, as PNG and SVG: step-α and the expected length.

    Example: [bold]beagle research plot runs/mine/log.csv runs/other/log.csv --out plots[/bold]
    """
    from beagle.research.training_log import plot_logs

    o.console.print(f"written to {out}: {', '.join(plot_logs(logs, out))}", highlight=False, soft_wrap=True)


def show_findings(findings: Iterable[Finding]) -> None:
    """Each claim with what the paper found and what was found here."""
    for f in findings:
        verdict = "agrees" if f.agrees else "[yellow]differs[/yellow]"
        o.console.print(f"{f.claim}: {f.found} (paper: {f.paper}): {verdict}", highlight=False, soft_wrap=True)
