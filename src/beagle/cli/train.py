"""``beagle train``: from prompts to a draft head."""

from __future__ import annotations

import signal
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from beagle.cli import options as o
from beagle.errors import BeagleError
from beagle.files import writing_to

if TYPE_CHECKING:
    from beagle.ranks import Ranks
    from beagle.training.server import Endpoint
    from beagle.training.vllm_states import StatesServer


@o.with_ranks
def train(
    ranks: Ranks,
    out: Annotated[Path, typer.Option("--out", "-o", help="Folder of the run; the head ends in OUT/head.")],
    prompts: Annotated[
        Path | None,
        typer.Option(
            help="Prompts, which the target answers: JSON lines or an array, gzipped or not, Parquet, Arrow, or a folder "
            "that the library datasets saved."
        ),
    ] = None,
    data: Annotated[Path | None, typer.Option(help="Folder of answers and states (default: OUT/data).")] = None,
    answers: Annotated[
        Path | None, typer.Option(help="Folder of the target's answers to the prompts; it answers none itself.")
    ] = None,
    answers_from: Annotated[
        str | None,
        typer.Option(
            help="Address of a server with OpenAI's API that answers the prompts in the target's place; its key is read "
            "from OPENAI_API_KEY."
        ),
    ] = None,
    answers_model: Annotated[str | None, typer.Option(help="The target's name on that server.")] = None,
    states_from: Annotated[
        str | None,
        typer.Option(help="Address of a vLLM server that writes hidden states, which the target then doesn't compute."),
    ] = None,
    states_folder: Annotated[
        Path | None, typer.Option(help="Folder that it writes them to (shared_storage_path), as seen from here.")
    ] = None,
    states_limit: Annotated[
        int, typer.Option(min=1, help="Most megabytes of such files at once; they are deleted once they are read.")
    ] = 1000,
    config: Annotated[Path | None, typer.Option("--config", "-c", help="Recipe, YAML (see configs/).")] = None,
    init: Annotated[
        str | None, typer.Option(help="A head to start from, named like --draft, instead of random weights.")
    ] = None,
    show_tau: Annotated[
        bool,
        typer.Option(
            "--show-tau", help="Show τ on a few held-out prompts after each minute of training; on with --init."
        ),
    ] = False,
    target: o.TargetName = "smollm2-135m",
    adapter: o.Adapter = None,
    dtype: o.DType = "float32",
    quantize: o.Quantize = None,
    device: o.Device = "auto",
    limit: Annotated[int | None, typer.Option(min=1, help="Only the first N prompts.")] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Stop answering after this many tokens.")] = None,
    seconds: Annotated[
        float | None, typer.Option(min=0.0, help="Stop training after about this long; resumable.")
    ] = None,
    log_with: Annotated[
        str | None, typer.Option(help="tensorboard, wandb or trackio: what log.csv gets goes there, too.")
    ] = None,
    skip_bad_lines: Annotated[
        bool, typer.Option("--skip-bad-lines", help="Leave out lines that are no prompt, or none for this target.")
    ] = False,
    trust_remote_code: o.Trust = False,
    device_map: o.DeviceMap = None,
    tensor_parallel: o.TensorParallel = False,
) -> None:
    """Train a draft head: answers and states, early stage, late stage. Run again, it goes on.

    True states are stored (answers.states: disk in the recipe; 2 bytes x hidden size a token) or computed again in
    every epoch (live). Store them where the disk has room: it is the faster way from the second epoch on.

    Answers that exist are not made again: the target's own, in a folder of token ids (--answers), or those that the
    dialogues of --prompts bring (answers.source: given in the recipe). A server that serves the target can answer in its
    place (--answers-from), with many requests at once (answers.rows).

    Example: [bold]beagle train --prompts prompts.jsonl --config configs/default.yaml --out runs/mine[/bold]

    At its end held-out prompts are decoded, and τ is shown beside what the training's own code says it is.

    A head of a model that this one was tuned from is a good start (--init): same shape, own draft vocabulary. τ is shown
    after each minute then. An adapter of the target is merged into it (--adapter).

    Example: [bold]beagle train --prompts prompts.jsonl --target your/model --answers-from http://host:8000/v1
    --answers-model your/model --out runs/mine[/bold]

    Example: [bold]beagle train --prompts domain.jsonl --target your/fine-tune --init runs/mine/head --out runs/tuned[/bold]

    Example: [bold]beagle train --data runs/mine/data --config recipe.yaml --log-with tensorboard --out runs/logged[/bold]
    """
    from beagle.meta import command_line
    from beagle.training.pipeline import train_head
    from beagle.training.prompts import read_prompts
    from beagle.training.recipe import Recipe, read_recipe
    from beagle.training.start import find_start, with_shape_of
    from beagle.training.states import refuse_without_answers
    from beagle.training.tracking import refuse_tracker
    from beagle.training.vllm_states import VllmStates

    recipe = read_recipe(config) if config else Recipe()
    if max_tokens:
        recipe = replace(recipe, answers=replace(recipe.answers, max_tokens=max_tokens))
    if log_with is not None:
        refuse_tracker(log_with)
    start = find_start(init, target) if init is not None else None
    if start:
        recipe = with_shape_of(recipe, start)
    given = recipe.answers.source != "target"
    questions = read_prompts(prompts, limit=limit, skip_bad_lines=skip_bad_lines, given=given) if prompts else None
    if answers and not prompts:
        raise BeagleError(f"--answers '{answers}' holds no prompts; give the file that they answer with --prompts")
    endpoint = _endpoint(answers_from, answers_model, answers, prompts)
    server = _states_server(states_from, states_folder, states_limit)
    if endpoint and server:
        endpoint = replace(endpoint, states=server.folder)
    if questions is None:
        refuse_without_answers(data or out / "data")
    with writing_to(out, "choose another --out"):
        out.mkdir(parents=True, exist_ok=True)
    if tensor_parallel and o.target_ranks(ranks, tensor_parallel) and prompts:
        raise BeagleError(
            f"--prompts '{prompts}': answers are made by one process, and --tensor-parallel has {ranks.count}; make them "
            "first (--answers-from, --device-map auto), then give their folder with --data"
        )
    if server and tensor_parallel:
        raise BeagleError(
            f"--states-from '{server.url}' spares the target's passes, and --tensor-parallel divides them; leave one of them "
            "out"
        )
    if device_map and ranks.count > 1:
        raise BeagleError(
            f"--device-map {device_map}: each of {ranks.count} processes would fill all devices; start one process, or use "
            "--tensor-parallel in its place"
        )
    engine: dict[str, Any] = {"dtype": dtype, "device": ranks.device(device), "trust_remote_code": trust_remote_code}
    engine |= {"device_map": device_map, "adapter": adapter}
    if tensor_parallel:
        engine["tensor_parallel"], ranks = ranks, ranks.mirrored()
    loaded = o.load_target(target, quantize=quantize, state_layers=recipe.state_layers, **engine)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # a job's manager ends it as Ctrl-C does
    try:
        with VllmStates(server, loaded, ranks.count) if server else nullcontext() as states:
            folder = train_head(
                loaded,
                questions,
                out,
                recipe,
                data=data,
                seconds=seconds,
                console=o.console,
                skip_bad_lines=skip_bad_lines,
                answers=endpoint or answers,
                init=start,
                show_tau=show_tau or start is not None,
                adapter=adapter,
                command=command_line(),
                log_with=log_with,
                ranks=ranks,
                states=states,
            )
    except KeyboardInterrupt:
        if ranks.stopped():
            o.console.print(f"[yellow]stopped; nothing is lost: run the same command again to go on in {out}[/yellow]")
        raise
    finally:
        signal.signal(signal.SIGTERM, before)
    own = f"{target} --adapter {adapter}" if adapter else target
    o.console.print(f'draft head written to {folder}; try: beagle generate "Hello" --target {own} --draft {folder}')


def _endpoint(url: str | None, model: str | None, answers: Path | None, prompts: Path | None) -> Endpoint | None:
    """The server that answers the prompts, if one does; refuses options that are missing or exclude each other."""
    from beagle.training.server import Endpoint

    if url is None:
        if model is not None:
            raise BeagleError(f"--answers-model '{model}' is a model of a server; give its address with --answers-from")
        return None
    if model is None:
        raise BeagleError(f"--answers-from '{url}' needs the target's name there; give it with --answers-model")
    if answers is not None:
        raise BeagleError(
            f"--answers '{answers}' holds answers, and --answers-from asks for some; leave one of them out"
        )
    if prompts is None:
        raise BeagleError(f"--answers-from '{url}' needs prompts to ask; give them with --prompts")
    return Endpoint(url, model)


def _states_server(url: str | None, folder: Path | None, megabytes: int) -> StatesServer | None:
    """The server that gives hidden states, if one does; refuses its address or folder alone."""
    from beagle.training.vllm_states import StatesServer

    if url is None:
        if folder is not None:
            raise BeagleError(
                f"--states-folder '{folder}' is a folder of a server; give the server's address with --states-from"
            )
        return None
    if folder is None:
        raise BeagleError(
            f"--states-from '{url}' needs the folder that the server writes to (shared_storage_path); give it with "
            "--states-folder"
        )
    return StatesServer(url, folder, megabytes * 1_000_000)
