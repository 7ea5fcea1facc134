"""``beagle eval``: question suites, every mode, raw answers; goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beagle.cli import options as o
from beagle.cli.tables import follow, show
from beagle.errors import BeagleError
from beagle.evaluation.records import SHOWN, Record, read_records, read_result, write_result

if TYPE_CHECKING:
    from beagle.decoding.costs import Costs
    from beagle.evaluation.modes import System
    from beagle.training.prompts import Prompt

    Sets = dict[str, list[Prompt]]


def eval(
    suite: Annotated[str | None, typer.Option(help="quick (ships with the package), paper or spec-bench.")] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            help="Question file, .jsonl, or a hub data set, owner/name/config:split (config and split where there are "
            "several; repeatable)."
        ),
    ] = None,
    json: Annotated[
        Path | None, typer.Option("--json", help="Write figures and every answer here, as they come.")
    ] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Go on with the run in --json where it stopped, if there is one.")
    ] = False,
    limit: Annotated[
        int | None, typer.Option(min=1, help="Only N questions of each set, its categories in turn.")
    ] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option("--max-new-tokens", "-n", min=1, help="Of each turn; 64 in 'quick', else 128.")
    ] = None,
    repeats: Annotated[int, typer.Option(min=1, help="Times every mode answers every question.")] = 1,
    modes: o.Modes = "",
    eagle: o.Eagle = None,
    small_model: o.SmallModel = None,
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
    """Every available mode on a suite of questions, all turns, interleaved; ends in tables.

    Examples: [bold]beagle eval --suite quick[/bold]

    [bold]beagle eval --suite paper --limit 20 --repeats 3 --json results/paper.json[/bold]
    (then the same with [bold]--resume[/bold] if it was stopped, and [bold]beagle report results/paper.json --out report[/bold])
    """
    from beagle.drafters.load import resolve_draft
    from beagle.evaluation import suites
    from beagle.evaluation.figures import figures
    from beagle.evaluation.modes import Drafts, Options, available, check_modes, load_systems
    from beagle.evaluation.run import run
    from beagle.meta import command_line, describe, redact_paths
    from beagle.training.prompts import answerable

    if (suite is None) == (not questions):
        raise BeagleError(f"give either --suite ({', '.join(suites.SUITES)}) or --questions FILE")
    if resume and json is None:
        raise BeagleError("--resume needs --json, the file to go on with")
    sets = suites.load_suite(suite, limit) if suite else suites.load_questions(questions or [], limit, skip_bad_lines)
    drafts = Drafts(draft, eagle, small_model)
    chosen = o.split_modes(modes) or available(drafts, resolve_draft(draft, target), quick=suite == "quick")
    check_modes(chosen, drafts)
    length = max_new_tokens or (64 if suite == "quick" else 128)
    plan = o.tree_plan(tree, depth, tree_top_k, nodes)
    arguments: dict[str, Any] = {
        "suite": suite, "questions": [redact_paths(name) for name in questions or []], "limit": limit,
        "max_new_tokens": length, "repeats": repeats, "modes": chosen, "temperature": temperature, "exact": exact,
        "seed": seed, "target": redact_paths(target), "draft": redact_paths(draft), "eagle": redact_paths(eagle) if eagle else None,
        "small_model": redact_paths(small_model) if small_model else None, "dtype": dtype, "device": device,
        "quantize": quantize, "tree": tree, "depth": depth, "top_k": tree_top_k, "nodes": nodes or "by cost",
    }  # fmt: skip
    records = _earlier(json, resume, arguments)
    engine: dict[str, Any] = {"dtype": dtype, "device": device, "trust_remote_code": trust_remote_code}
    loaded = o.load_target(target, quantize=quantize, **engine)
    sets = {name: answerable(loaded, prompts, skip_bad_lines) for name, prompts in sets.items()}
    systems = load_systems(loaded, chosen, drafts, plan, **engine)
    about = describe(loaded, (system.model.drafter for system in systems))
    meta: dict[str, Any] = {**about, "command": command_line(), "arguments": arguments}
    costs = _costs(systems, exact)
    weights = {system.mode: system.weights_mb for system in systems}
    meta["costs"] = {mode: vars(cost) for mode, cost in costs.items()}
    total = sum(map(len, sets.values()))
    asked = _questions(sets)

    def result() -> dict[str, Any]:
        finished = len({(r.set, r.id) for r in records})
        state = {"finished_questions": finished, "interrupted": finished < total}
        return figures(records, costs, weights, greedy=not temperature) | {"meta": meta | state, "questions": asked}

    done = {(r.set, r.id) for r in records}
    stopped: BaseException | None = None
    try:
        options = Options(length, temperature, exact, seed)
        parts = run(systems, sets, options, repeats=repeats, done=done, pieces=json is not None)
        for part in follow(parts, total, len(done)):
            records += part
            if json is not None:
                write_result(json, result(), records)
    except (KeyboardInterrupt, BeagleError) as error:
        if not records:
            raise
        stopped = error
    if records:
        show(result())
    if isinstance(stopped, BeagleError):
        raise stopped
    if stopped:
        where = f"kept in {json}; the same command with --resume goes on" if json else "not kept; use --json to keep it"
        o.console.print(f"[yellow]stopped; what is finished is {where}[/yellow]", highlight=False)
        raise typer.Exit(130)


def _costs(systems: list[System], exact: bool) -> dict[str, Costs]:
    with o.console.status("measuring what a pass costs here"):
        found = {system.mode: system.costs(exact) for system in systems}
    return {mode: cost for mode, cost in found.items() if cost is not None}


def _questions(sets: Sets) -> list[dict[str, Any]]:
    """What was asked, cut to what a viewer shows."""
    return [
        {"set": name, "id": p.id, "category": p.category, "turns": [text if len(text) <= SHOWN else text[:SHOWN] + "…" for text in p.turns]}
        for name, prompts in sets.items()
        for p in prompts
    ]  # fmt: skip


def _earlier(path: Path | None, resume: bool, arguments: dict[str, Any]) -> list[Record]:
    """The answers that an interrupted run of the same arguments on the same machine has left.

    Raises:
        BeagleError: the file can't be written or is of another run, or would be overwritten unfinished.
    """
    from beagle.meta import describe

    if path is None:
        return []
    o.check_writable(path)
    if not path.exists():
        return []
    if not resume:
        try:
            content = read_result(path)
        except BeagleError:
            return []  # no run of ours: --json names the file to write
        if content["meta"].get("interrupted"):
            raise BeagleError(f"'{path}' holds an unfinished run; add --resume to go on with it, or delete the file")
        return []
    content = read_result(path)
    earlier = content["meta"].get("arguments", {})
    for name, value in arguments.items():
        if earlier.get(name) != value:
            raise BeagleError(
                f"--resume: '{path}' was made with {name} {earlier.get(name)}, not {value}; repeat its command "
                "or choose another --json"
            )
    machine, here = content["meta"]["machine"], describe()["machine"]
    if any(machine.get(name) != here[name] for name in ("cpu", "gpu", "threads")):
        raise BeagleError(
            f"--resume: '{path}' was made on another machine ({machine.get('cpu')}); choose another --json"
        )
    return read_records(path, content)
