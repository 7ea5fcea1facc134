"""``beagle bench``: the side-by-side run on the first turns of question files."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any

import typer

from beagle.cli import options as o
from beagle.cli.tables import follow, show
from beagle.errors import BeagleError
from beagle.evaluation.records import Record
from beagle.files import write_json


def bench(
    questions: Annotated[list[Path], typer.Option(help="Question file, .jsonl (repeatable).")],
    json: Annotated[Path | None, typer.Option("--json", help="Write the figures here.")] = None,
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N questions of each file.")] = None,
    max_new_tokens: Annotated[int, typer.Option("--max-new-tokens", "-n", min=1)] = 128,
    modes: o.Modes = "plain,beagle,transformers",
    small_model: o.SmallModel = None,
    eagle: o.Eagle = None,
    target: o.TargetName = "smollm2-135m",
    draft: o.DraftName = "auto",
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    exact: o.Exact = False,
    dtype: o.DType = "auto",
    quantize: o.Quantize = None,
    device: o.Device = "auto",
    tree: o.Tree = "dynamic",
    depth: o.Depth = o.PLAN.depth,
    tree_top_k: o.TreeTopK = o.PLAN.top_k,
    nodes: o.Nodes = 0,
    skip_bad_lines: Annotated[bool, typer.Option("--skip-bad-lines")] = False,
    trust_remote_code: o.Trust = False,
) -> None:
    """Plain decoding, Beagle, its rivals and transformers' generate on the same prompts, interleaved.

    The short form of [bold]beagle eval[/bold]: first turns only, figures without the single answers.

    Examples: [bold]beagle bench --questions mt_bench.jsonl --limit 20 --json results/mt_bench.json[/bold]

    [bold]beagle bench --questions mt_bench.jsonl --target Qwen/Qwen2.5-1.5B-Instruct
    --small-model Qwen/Qwen2.5-0.5B-Instruct --modes plain,lookup,small,prompt-lookup,assisted[/bold]
    """
    from beagle.evaluation.figures import figures
    from beagle.evaluation.modes import Drafts, Options, check_modes, load_systems
    from beagle.evaluation.run import run
    from beagle.evaluation.suites import unique
    from beagle.meta import command_line, describe, redact_paths
    from beagle.training.prompts import answerable, read_prompts

    if json is not None:
        o.check_writable(json)
    if len({path.stem for path in questions}) < len(questions):
        raise BeagleError("two question files have the same name; rename one, names tell the sets apart")
    read = {path.stem: read_prompts(path, limit=limit, skip_bad_lines=skip_bad_lines) for path in questions}
    sets = {
        name: [replace(p, turns=p.turns[:1], category="") for p in unique(prompts)] for name, prompts in read.items()
    }
    chosen = o.split_modes(modes)
    drafts = Drafts(draft, eagle, small_model)
    check_modes(chosen, drafts)
    plan = o.tree_plan(tree, depth, tree_top_k, nodes)
    engine: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = o.load_target(target, quantize=quantize, **engine)
    sets = {name: answerable(loaded, prompts, skip_bad_lines) for name, prompts in sets.items()}
    systems = load_systems(loaded, chosen, drafts, plan, **engine)
    settings = Options(max_new_tokens, temperature, exact, seed)
    total = sum(map(len, sets.values()))
    records: list[Record] = []
    finished = 0
    stopped: BaseException | None = None
    try:
        for part in follow(run(systems, sets, settings), total):
            records += part
            finished += 1
    except (KeyboardInterrupt, BeagleError) as error:
        if not records:
            raise
        stopped = error
    result = figures(records, greedy=not temperature)
    result["meta"] = {
        **describe(loaded, (system.model.drafter for system in systems)),
        "command": command_line(),
        "arguments": {
            "questions": [path.name for path in questions], "limit": limit, "max_new_tokens": max_new_tokens,
            "temperature": temperature, "exact": exact, "quantize": quantize, "seed": seed, "draft": draft,
            "eagle": redact_paths(eagle) if eagle else None, "small_model": redact_paths(small_model) if small_model else None,
            "tree": tree, "depth": depth, "top_k": tree_top_k, "nodes": nodes or "by cost",
        },
        "finished_questions": finished,
        "interrupted": finished < total,
    }  # fmt: skip
    if json is not None:
        try:
            write_json(json, result)
        except OSError as error:
            raise BeagleError(f"cannot write '{json}': {error.strerror}; free space or choose another file") from error
        finally:
            show(result)
    else:
        show(result)
    if stopped is not None:  # what is finished is shown and stored
        raise stopped
