"""``beagle eval``: question suites, every mode, raw answers; goes on where it was stopped."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beagle.cli import options as o
from beagle.cli.tables import follow, show
from beagle.errors import BeagleError
from beagle.evaluation.records import Record, read_records, read_result
from beagle.files import first_change

if TYPE_CHECKING:
    from beagle.ranks import Ranks
    from beagle.targets.target import Target


@o.with_setup
@o.with_ranks
def eval(
    ranks: Ranks,
    *,
    suite: Annotated[str | None, typer.Option(help="quick (ships with the package), paper or spec-bench.")] = None,
    questions: Annotated[
        list[str] | None,
        typer.Option(
            help="Question file, .jsonl, or a hub data set, owner/name/config:split (config and split where there are "
            "several; repeatable)."
        ),
    ] = None,
    first_turns: Annotated[bool, typer.Option("--first-turns", help="Only the first turn of each question.")] = False,
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
    temperature: o.Temperature = 0.0,
    seed: o.Seed = 0,
    setup: o.Setup,
    tensor_parallel: o.TensorParallel = False,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that are no question, or none for this target.")
    ] = False,
) -> None:
    """Every available mode on a suite of questions, all turns, interleaved; ends in tables.

    Examples: [bold]beagle eval --suite quick[/bold]

    [bold]beagle eval --suite paper --limit 20 --repeats 3 --json results/paper.json[/bold]
    (then the same with [bold]--resume[/bold] if it was stopped, and [bold]beagle report results/paper.json --out report[/bold])

    [bold]beagle eval --questions mt_bench.jsonl --first-turns --target Qwen/Qwen2.5-1.5B-Instruct
    --small-model Qwen/Qwen2.5-0.5B-Instruct --modes plain,lookup,small,prompt-lookup,assisted[/bold]
    """
    from beagle.drafters.load import resolve_draft
    from beagle.evaluation import suites
    from beagle.evaluation.modes import Drafts, Options, available, check_modes, load_systems
    from beagle.evaluation.session import Session
    from beagle.meta import command_line, describe, redact_paths
    from beagle.training.prompts import answerable

    if (suite is None) == (not questions):
        raise BeagleError(f"give either --suite ({', '.join(suites.SUITES)}) or --questions FILE")
    if resume and json is None:
        raise BeagleError("--resume needs --json, the file to go on with")
    if o.target_ranks(ranks, tensor_parallel).count > 1 and resume:
        raise BeagleError("--resume does not go with --tensor-parallel; start over, with another --json")
    json = json if ranks.leads else None
    sets = suites.load_suite(suite, limit) if suite else suites.load_questions(questions or [], limit, skip_bad_lines)
    if first_turns:
        sets = suites.first_turns(sets)
    drafts = Drafts(setup.draft, eagle, small_model)
    named = [mode.strip() for mode in modes.split(",") if mode.strip()]
    chosen = named or available(drafts, resolve_draft(setup.draft, setup.target), quick=suite == "quick")
    check_modes(chosen, drafts)
    length = max_new_tokens or (64 if suite == "quick" else 128)
    plan = setup.plan()
    arguments: dict[str, Any] = {
        "suite": suite, "questions": [redact_paths(name) for name in questions or []], "limit": limit,
        "max_new_tokens": length, "repeats": repeats, "modes": chosen, "temperature": temperature, "seed": seed,
        "eagle": redact_paths(eagle) if eagle else None,
        "small_model": redact_paths(small_model) if small_model else None, **setup.arguments(),
        "first_turns": first_turns or None,  # older files don't have it
    }  # fmt: skip
    known = {name: value for name, value in arguments.items() if name not in ("exact", "modes")}
    _earlier(json, resume, known)  # before the target is loaded, on which the two others depend
    layers = drafts.state_layers(chosen, setup.target)
    loaded = o.load_target(
        setup.target, adapter=setup.adapter, quantize=setup.quantize, state_layers=layers, device_map=setup.device_map,
        tensor_parallel=ranks, **setup.engine(),
    )  # fmt: skip
    exact = arguments["exact"] = setup.exact_of(loaded)
    chosen = arguments["modes"] = _of_target(loaded, chosen)
    records = _earlier(json, resume, arguments)
    sets = {name: answerable(loaded, prompts, skip_bad_lines) for name, prompts in sets.items()}
    systems = load_systems(loaded, chosen, drafts, plan, adapter=setup.adapter, **setup.engine())
    with o.console.status("measuring what a pass costs here"):
        costs = {s.mode: cost for s in systems if (cost := s.costs(exact)) is not None}
    about = describe(loaded, (system.model.drafter for system in systems))
    about |= {"command": command_line(), "arguments": arguments, "costs": {m: vars(cost) for m, cost in costs.items()}}
    options = Options(length, temperature, exact, seed)
    session = Session(systems, sets, options, about, json, records, costs, repeats)
    stopped: BaseException | None = None
    try:
        for _ in follow(session.run(), session.total, len(session.done)):
            pass
    except (KeyboardInterrupt, BeagleError) as error:
        if not records:
            raise
        stopped = error
    if records:
        show(session.result())
    if isinstance(stopped, BeagleError):
        raise stopped
    if stopped:
        where = f"kept in {json}; the same command with --resume goes on" if json else "not kept; use --json to keep it"
        o.console.print(f"[yellow]stopped; what is finished is {where}[/yellow]", highlight=False)
        raise typer.Exit(130)


def _of_target(target: Target, modes: list[str]) -> list[str]:
    """The modes that there are for a target; a line names the others."""
    from beagle.evaluation.modes import not_of

    out = not_of(target, modes)
    if out:
        o.console.print(
            f"{target.name}: transformers can't draft for a target with a recurrent state, so {' and '.join(out)} "
            f"{'are' if len(out) > 1 else 'is'} left out",
            style="dim", markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
    return [mode for mode in modes if mode not in out]


def _earlier(path: Path | None, resume: bool, arguments: dict[str, Any]) -> list[Record]:
    """The answers that an interrupted run of the same arguments on the same machine has left."""
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
    if name := first_change(earlier, arguments):
        raise BeagleError(
            f"--resume: '{path}' was made with {name} {earlier.get(name)}, not {arguments[name]}; repeat its command "
            "or choose another --json"
        )
    machine, here = content["meta"]["machine"], describe()["machine"]
    if first_change(machine, {name: here[name] for name in ("cpu", "gpu", "threads")}):
        raise BeagleError(
            f"--resume: '{path}' was made on another machine ({machine.get('cpu')}); choose another --json"
        )
    return read_records(path, content)
