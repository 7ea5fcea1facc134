"""``beagle bench``: the side-by-side run on question files."""

from __future__ import annotations

import os
import shlex
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.progress import Progress
from rich.table import Table

from beagle.cli import options as o
from beagle.drafters.small import PREFIX
from beagle.errors import BeagleError
from beagle.evaluation import bench as b
from beagle.evaluation.meta import describe
from beagle.training.prompts import read_prompts
from beagle.training.states import write_json


def bench(
    questions: Annotated[list[Path], typer.Option(help="Question file, .jsonl (repeatable).")],
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions of each file.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    modes: Annotated[
        str,
        typer.Option(
            help="Comma-separated. Our engine: plain, beagle (what --draft names), lookup (prompt lookup), small "
            "(--small-model drafts). transformers' generate: transformers, prompt-lookup, assisted (by --small-model)."
        ),
    ] = "plain,beagle,transformers",
    small_model: Annotated[
        str | None,
        typer.Option(
            help="A smaller model with the target's tokenizer, for 'small' and 'assisted'; named like --target."
        ),
    ] = None,
    target: o.TargetName = "smollm2-135m",
    draft: o.DraftName = "auto",
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    exact: o.Exact = False,
    dtype: o.DType = "auto",
    device: o.Device = "auto",
    tree: o.Tree = "dynamic",
    depth: o.Depth = 5,
    beam: o.TopK = 8,
    nodes: o.Nodes = 0,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines")] = False,
    trust_remote_code: o.Trust = False,
) -> None:
    """Plain decoding, Beagle, its rivals and transformers' generate on the same prompts, interleaved.

    Examples: [bold]beagle bench --questions mt_bench.jsonl --limit 20 --json results/mt_bench.json[/bold]

    [bold]beagle bench --questions mt_bench.jsonl --target Qwen/Qwen2.5-1.5B-Instruct
    --small-model Qwen/Qwen2.5-0.5B-Instruct --modes plain,lookup,small,prompt-lookup,assisted[/bold]
    """
    if json is not None:
        o.check_writable(json)
    if len({path.stem for path in questions}) < len(questions):
        raise BeagleError("two question files have the same name; rename one, names tell the sets apart")
    sets = {path.stem: read_prompts(path, limit=limit, skip_bad_lines=skip_bad_lines) for path in questions}
    chosen = [mode.strip() for mode in modes.split(",") if mode.strip()]
    if not chosen:
        raise BeagleError(f"--modes is empty; use some of {', '.join(b.MODES)}")
    b.check_modes(chosen, small_model)
    plan = o.tree_plan(tree, depth, beam, nodes)
    model = o.load_model(target, draft, dtype, device, plan, trust_remote_code)
    rivals = b.load_rivals(
        model, chosen, target, small_model, dtype=dtype, device=device, trust_remote_code=trust_remote_code
    )
    settings = b.Options(max_new_tokens, temperature, exact, seed)
    total = sum(map(len, sets.values()))
    with Progress(console=o.console) as progress:
        task = progress.add_task("questions", total=total)

        def advance(name: str) -> None:
            progress.update(task, advance=1, description=name)

        runs = b.run(model, sets, chosen, settings, advance, rivals)
    merged = b.merge(runs)
    result: dict[str, Any] = b.summary(merged)
    result["sets"] = {name: b.summary(by_mode) for name, by_mode in runs.items() if by_mode[chosen[0]].stats}
    if "plain" in chosen and not temperature:
        flat = {name: prompts for name, prompts in sets.items()}
        result["first_differences"] = {
            mode: {n: b.first_differences(model, flat[n], by_mode, mode) for n, by_mode in runs.items()}
            for mode in chosen
            if mode != "plain"
        }
    finished = len(merged[chosen[0]].stats)
    result["meta"] = {
        **describe(model.target),
        "command": shlex.join(["beagle", *(portable(word) for word in sys.argv[1:])]),
        "arguments": {
            "questions": [path.name for path in questions], "limit": limit, "max_new_tokens": max_new_tokens,
            "temperature": temperature, "exact": exact, "seed": seed, "draft": draft,
            "small_model": portable(small_model) if small_model else None, "tree": tree,
            "depth": depth, "beam": beam, "nodes": nodes or "by cost",
        },
        "finished_questions": finished,
        "interrupted": finished < total,
    }  # fmt: skip
    if json is not None:
        try:
            write_json(json, result)
        except OSError as error:
            raise BeagleError(f"cannot write '{json}': {error.strerror}; free space or choose another file") from error
    show(result)


def portable(word: str) -> str:
    """A word of the command line without the folders of this machine."""
    if word.startswith(PREFIX):
        return PREFIX + portable(word.removeprefix(PREFIX))
    data = os.environ.get("BEAGLE_DATA")
    if data and word.startswith(data):
        return "$BEAGLE_DATA" + word.removeprefix(data.rstrip("/"))
    return Path(word).name if word.startswith("/") else word


def show(result: dict[str, Any]) -> None:
    console = Console()
    for name, part in [*result["sets"].items(), ("all", result)]:
        table = Table(
            title=f"{name} ({next(iter(part['modes'].values()))['questions']} questions)", title_justify="left"
        )
        for column in ("mode", "tokens", "token/s", "τ", "step-α 1…5", "identical", "prefill s", "peak MB"):
            table.add_column(column, justify="left" if column == "mode" else "right")
        for mode, m in part["modes"].items():
            alphas = " ".join(f"{a:.2f}" for a in m["step_alpha"][:5]) or "-"
            same = "-" if m["identical"] is None else f"{m['identical']:.1%}"
            table.add_row(
                mode, str(m["tokens"]), f"{m['tokens_per_second']:.1f}", f"{m['tau']:.2f}", alphas, same,
                f"{m['prefill_seconds']:.1f}", f"{m['peak_memory_mb']:.0f}",
            )  # fmt: skip
        console.print(table)
        for pair, r in part["ratios"].items():
            if r:
                console.print(
                    f"  {pair}: {r['median']:.2f}× median, {r['low']:.2f} to {r['high']:.2f} (10th to 90th percentile), {r['pooled']:.2f}× pooled",
                    highlight=False,
                )
    console.print("[dim]τ: tokens per target pass after prefill, over all steps, bonus token counted[/dim]")
