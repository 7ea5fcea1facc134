"""From prompts to a draft checkpoint: answers and states, early stage, late stage, export."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import asdict, replace
from functools import partial
from itertools import chain
from math import ceil
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn

from beagle.drafters.checkpoint import load_head
from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.meta import describe, redact_paths
from beagle.ranks import ALONE, Ranks
from beagle.targets.target import Target
from beagle.training.answer_files import AnswerFolder
from beagle.training.answers import AnswerGenerator, Sample
from beagle.training.data import samples
from beagle.training.dialogues import answered
from beagle.training.endpoint import fetch_answers
from beagle.training.folder import alone, identity, read_progress
from beagle.training.prompts import Prompt, answerable, has_template, numbered
from beagle.training.recipe import AnswerConfig, Recipe
from beagle.training.served import CAUSES, EachMinute, measure_served, tau_of
from beagle.training.server import Endpoint
from beagle.training.start import refuse_other_start, start_from, started_from
from beagle.training.states import Fingerprint, StateStore, refuse_without_answers
from beagle.training.texts import TextReader, store_texts
from beagle.training.tracking import tracking
from beagle.training.trainer import Trainer, refuse_before_answers
from beagle.training.vllm_states import VllmStates


def describe_states(width: int, states: str) -> str:
    """What ``answers.states`` costs at this width, and what the other choice would."""
    gigabytes = 2 * width * 1e6 / 1e9  # bfloat16
    if states == "disk":
        return f"{gigabytes:.2f} GB per million tokens at width {width} (answers.states: live stores none)"
    return (
        "computed live, none stored; every epoch runs the target again "
        f"(answers.states: disk stores {gigabytes:.2f} GB per million tokens)"
    )


def make_answers(
    target: Target,
    prompts: list[Prompt],
    folder: Path,
    config: AnswerConfig,
    console: Console,
    skip_bad_lines: bool | None = False,
    answers: AnswerFolder | None = None,
    served: VllmStates | None = None,
) -> StateStore:
    """Fill a state store; run again after an interruption, it answers what is missing.

    Args:
        answers: the target's answers to the prompts, made once; the target answers none itself. ``rows``,
            ``sampled_share`` and ``temperature`` of the config are of no use then. With source ``both`` they are the
            answers to the prompts that don't keep their own.
        skip_bad_lines: leave out prompts that the target's chat template refuses, each with a line on stderr; None as
            of ``read_prompts``.
        served: a server that gives the states of answers that exist; None: the target makes them.
    Raises:
        BeagleError: a prompt is refused, another run fills the store, or there is not one answer; or ``answers`` are
            another target's, or are not wanted.
    """
    if answers and config.source == "given":
        raise BeagleError(
            f"answers.source: given trains on the answers in the prompts' file, not on those in '{answers.folder}'; "
            "leave one of them out"
        )
    source = {"given": "given", "target": "files" if answers else None}.get(
        config.source, f"{config.given_share:g} given"
    )
    with alone(folder, ".answers.lock"):
        fingerprint = Fingerprint.of(target, config.max_prompt_tokens, config.max_new_tokens, source)
        if answers:
            answers.refuse_other_target(target)
        store = StateStore(folder, fingerprint, with_states=config.states == "disk")
        given, asked = divided(prompts, config)
        most = config.max_tokens
        if given:
            if most and asked:
                most = ceil(most * len(given) / len(prompts))
            some = replace(config, max_tokens=most)
            _read_answers(target, given, store, some, console, skip_bad_lines, served=served)
        if asked and answers:
            rest = (
                replace(config, max_tokens=config.max_tokens - most) if config.max_tokens and most and given else config
            )
            _read_answers(target, asked, store, rest, console, skip_bad_lines, answers, served)
        elif todo := _unanswered(target, asked, store, config, console, skip_bad_lines):
            _answer(target, todo, store, config, console)
        return store


def divided(prompts: list[Prompt], config: AnswerConfig) -> tuple[list[Prompt], list[Prompt]]:
    """The prompts that keep the answers that they bring, and those that are asked.

    A prompt's content and the seed alone decide, as for all that is drawn.

    Returns:
        Both with a key for each prompt (see ``numbered``).
    """
    prompts = numbered(prompts)
    if config.source != "both":
        return (prompts, []) if config.source == "given" else ([], prompts)
    given: list[Prompt] = []
    asked: list[Prompt] = []
    for prompt in prompts:
        drawn = random.Random(f"{config.seed}/given/{prompt.key}").random() < config.given_share
        brings = prompt.text or any(True for _ in answered(prompt.given()))
        (given if brings and (drawn or not prompt.is_askable) else asked).append(prompt)
    return given, asked


def _read_answers(
    target: Target,
    prompts: list[Prompt],
    store: StateStore,
    config: AnswerConfig,
    console: Console,
    skip_bad_lines: bool | None,
    answers: AnswerFolder | None = None,
    served: VllmStates | None = None,
) -> None:
    """Fill the store with answers that exist: those of a folder, else those in the prompts' file."""
    reader = TextReader(target, config)
    console.print(f"states: {describe_states(target.state_size, config.states)}", highlight=False)
    texts = reader.stored(answers, prompts) if answers else reader.given(prompts, skip_bad_lines)
    store_texts(target, texts, store, console, max_tokens=config.max_tokens, seed=config.seed, served=served)
    for line in reader.left_out:
        console.print(line, highlight=False, markup=False)
    if reader.too_long:
        console.print(_too_long(reader.too_long, config), highlight=False)
    if reader.cut:
        console.print(
            f"{reader.cut} answers are longer than {config.max_new_tokens} tokens, and are cut there "
            "(answers.max_new_tokens)",
            highlight=False,
        )
    if not store.shards():
        raise BeagleError(
            f"no answer could be used: {reader.too_long} turns are longer than {config.max_prompt_tokens} tokens, the "
            "other answers are empty; raise answers.max_prompt_tokens or give other prompts"
        )


def _too_long(count: int, config: AnswerConfig) -> str:
    return (
        f"{count} turns are longer than {config.max_prompt_tokens} tokens with what comes before them, and are left out "
        "(answers.max_prompt_tokens)"
    )


def _unanswered(
    target: Target,
    prompts: list[Prompt],
    store: StateStore,
    config: AnswerConfig,
    console: Console,
    skip_bad_lines: bool | None,
) -> list[Prompt]:
    """The prompts that the store lacks, none where it has enough tokens."""
    done = store.answered()
    todo = [prompt for prompt in prompts if prompt.key not in done]
    if not todo or (config.max_tokens and store.tokens() >= config.max_tokens):
        return []
    if not has_template(target):
        console.print(
            f"{target.name} has no chat template: prompts are taken as raw text, of each the first turn alone, without "
            "a system message",
            highlight=False,
        )
    with console.status("checking the prompts"):
        return answerable(target, todo, skip_bad_lines)


def _answer(target: Target, todo: list[Prompt], store: StateStore, config: AnswerConfig, console: Console) -> None:
    random.Random(config.seed).shuffle(todo)
    have = store.tokens()
    longest = (config.max_prompt_tokens + config.max_new_tokens) * len(todo) * config.max_turns
    console.print(f"states: {describe_states(target.state_size, config.states)}", highlight=False)
    store.refuse_if_full(min(longest, (config.max_tokens or longest) - have))
    generator = AnswerGenerator(target, replace(config, rows=min(config.rows, len(todo))))
    starts = range(0, len(todo), 1024)  # similar lengths together: less padding
    chunks = (sorted(todo[at : at + 1024], key=lambda p: len(p.turns[0])) for at in starts)
    with Progress(*Progress.get_default_columns(), TextColumn("{task.fields[note]}"), console=console) as progress:
        task = progress.add_task("answers", total=config.max_tokens or None, completed=have, note="")

        def counted() -> Iterator[Sample]:
            tokens = have
            for answered, sample in enumerate(generator.run(chain.from_iterable(chunks)), 1):
                tokens += len(sample.tokens)
                progress.update(task, completed=tokens, note=f"{answered} answers, {tokens:,} tokens")
                yield sample
                if config.max_tokens and tokens >= config.max_tokens:
                    return

        store.write(counted())
    if generator.too_long:
        console.print(_too_long(generator.too_long, config), highlight=False)
    if not store.shards():
        raise BeagleError(f"no prompt could be answered: {_reasons(generator, target)}")


def _reasons(generator: AnswerGenerator, target: Target) -> str:
    reasons = []
    if generator.too_long:
        reasons.append(
            f"{generator.too_long} longer than {generator.config.max_prompt_tokens} tokens; give shorter ones or raise "
            "answers.max_prompt_tokens"
        )
    if generator.empty:
        reasons.append(
            f"{generator.empty} with an empty answer, which {target.name} ends at once; give other prompts, or check its "
            "chat template and end-of-text token"
        )
    return "; ".join(reasons)


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
