"""From prompts to a draft checkpoint: answers and states, early stage, late stage, export."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path

from rich.console import Console

from beagle.drafters.checkpoint import load_head
from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.meta import describe, redact_paths
from beagle.ranks import ALONE, Ranks
from beagle.targets.target import Target
from beagle.training.answer_files import AnswerFolder
from beagle.training.data import samples
from beagle.training.endpoint import fetch_answers
from beagle.training.folder import alone, identity, read_progress
from beagle.training.make_answers import divided, make_answers
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig, Recipe
from beagle.training.served import CAUSES, EachMinute, measure_served, tau_of
from beagle.training.server import Endpoint
from beagle.training.start import refuse_other_start, start_from, started_from
from beagle.training.states import Fingerprint, StateStore, refuse_without_answers
from beagle.training.tracking import tracking
from beagle.training.trainer import Trainer, refuse_before_answers
from beagle.training.vllm_states import VllmStates


def train_head(
    target: Target,
    prompts: list[Prompt] | None,
    out: Path,
    recipe: Recipe,
    *,
    data: Path | None = None,
    seconds: float | None = None,
    console: Console,
    skip_bad_lines: bool = False,
    answers: Path | Endpoint | None = None,
    init: Path | None = None,
    show_tau: bool = False,
    adapter: str | None = None,
    command: str | None = None,
    log_with: str | None = None,
    ranks: Ranks = ALONE,
    states: VllmStates | None = None,
) -> Path:
    """The whole run; every part resumes.

    Args:
        prompts: None if the answers are already in ``data``.
        data: folder of answers and states (default: ``out/data``).
        answers: the target's answers to the prompts, which it then needs not answer: a folder (see ``AnswerFolder``), or
            a server that is asked for them, into ``out/answers``.
        init: folder of a head whose weights this one starts from; the recipe has its shape (see ``with_shape_of``).
        show_tau: show τ on a few held-out prompts after each minute of training, where one process trains.
        adapter: that the target was loaded with, for ``result.json``.
        log_with: a tracker that gets what ``log.csv`` gets (see ``tracking``).
        ranks: the processes that train together; rank 0 makes answers and writes files, the others wait for the answers.
        states: a server that gives the hidden states of answers that exist; None: the target computes them.
    Returns:
        The draft checkpoint's folder.
    Raises:
        BeagleError: see the message; what takes no answer to find out is found out before the first. A head that drafts
            worse than in training is written before that is said.
    """
    folder = data or out / "data"
    if not ranks.leads:
        return _follow(target, folder, out, recipe, ranks, seconds, init, states)
    if states and prompts is not None and answers is None and recipe.answers.source != "given":
        raise BeagleError(
            f"'{states.server.url}' gives hidden states of answers that exist; let it answer too, or give answers (a "
            "folder of them, or answers.source: given)"
        )
    if prompts is None:
        refuse_without_answers(folder)
        if answers:
            raise BeagleError(f"'{answers}' holds answers without their prompts; give the prompts too")
    if isinstance(answers, Endpoint) and recipe.answers.source == "given":
        raise BeagleError(
            "answers.source: given trains on the answers in the prompts' file, and asks no endpoint; leave one of them out"
        )
    stored = AnswerFolder.open(answers) if isinstance(answers, Path) else None
    with alone(out):
        refuse_before_answers(target, out, recipe.train, recipe.head)
        first = load_head(init, target) if init else None
        refuse_other_start(out, init)
        progress = read_progress(out, identity(recipe.train, recipe.head)) or {}
        settings = {"answers": asdict(recipe.answers), "train": asdict(recipe.train), "head": recipe.head}
        with tracking(log_with, out, settings, progress.get("step", 0)) as track:
            if prompts is not None:
                if isinstance(answers, Endpoint):
                    asked = out / "answers"
                    _, todo = divided(prompts, recipe.answers)
                    stored = fetch_answers(answers, target, todo, asked, recipe.answers, console, skip_bad_lines)
                store = make_answers(target, prompts, folder, recipe.answers, console, skip_bad_lines, stored, states)
            else:
                store = _existing(target, folder, recipe.answers)
            if states and not store.with_states:
                states.trial(samples(store.shards()[:1], validation=False, with_states=False))
            ranks.tell("answers")
            trainer = Trainer(target, store, out, recipe.train, recipe.head, ranks, states)
            held_out = [sample for group in trainer.validation for sample in group]
            if init and first and trainer.step == 0:
                tau = tau_of(init, target, held_out)
                start_from(trainer.head, first, init, out, tau)
                if tau is not None:
                    console.print(
                        f"τ of the head that is started from, on held-out prompts: {tau:.2f}", highlight=False
                    )
            report = partial(console.print, highlight=False)
            shown = show_tau and held_out and ranks.count == 1  # other processes would wait for it
            watch = EachMinute(trainer.head, target, held_out, report) if shown else None
            alphas = trainer.train(seconds=seconds, report=report, track=track, watch=watch)
        about = describe(target) | {
            "stored_tokens": store.tokens(),
            "trained_tokens": trainer.tokens,
            "train_seconds": round(trainer.seconds, 1),
            "train_joules": round(trainer.joules) if trainer.energy.readable else None,
            "steps": trainer.step,
            "validation_step_alpha": [round(a, 4) for a in alphas],
            "recipe": trainer.identity(),
            "answers": asdict(recipe.answers),
            "prompts": len(prompts) if prompts is not None else None,
            "init": started_from(out) if init else None,
            "adapter": redact_paths(adapter) if adapter else None,
            "command": command,
        }
        trainer.export(out / "head", about)
        write_json(out / "result.json", about)
        ranks.tell("head")
        served = measure_served(trainer.head, out / "head", target, held_out)
        lines = served.lines(alphas) if served else ["no answer is held out, so that none is decoded to compare"]
        for line in lines:
            console.print(line, highlight=False)
        write_json(out / "result.json", about | {"served": served.as_dict() if served else None})
        if served and served.falls_short:
            raise BeagleError(
                f"the head in '{out / 'head'}' drafts worse than in training (τ {served.tau:.2f}, simulated "
                f"{served.simulated:.2f}); {CAUSES}"
            )
        return out / "head"


def _follow(
    target: Target,
    folder: Path,
    out: Path,
    recipe: Recipe,
    ranks: Ranks,
    seconds: float | None,
    init: Path | None,
    states: VllmStates | None,
) -> Path:
    """What ranks but the first do of a run: compute, and write nothing."""
    ranks.wait_for("answers")
    trainer = Trainer(target, _existing(target, folder, recipe.answers), out, recipe.train, recipe.head, ranks, states)
    held_out = [sample for group in trainer.validation for sample in group]
    divided = target.ranks.count > 1  # then every pass of rank 0's needs all ranks
    if divided and init and trainer.step == 0:
        tau_of(init, target, held_out)
    trainer.train(seconds=seconds)
    if divided:
        ranks.wait_for("head")
        measure_served(trainer.head, out / "head", target, held_out)
    return out / "head"


def _existing(target: Target, folder: Path, config: AnswerConfig) -> StateStore:
    """The answers that another run has left."""
    source = StateStore.existing(folder).fingerprint.source
    fingerprint = Fingerprint.of(target, config.max_prompt_tokens, config.max_new_tokens, source)
    return StateStore(folder, fingerprint, with_states=config.states == "disk")
