"""Answers of a target into a store: those that it makes now, made once, or that dialogues bring."""

from __future__ import annotations

import random
from collections.abc import Iterator
from dataclasses import dataclass, replace
from itertools import chain
from math import ceil
from pathlib import Path

from rich.console import Console
from rich.progress import Progress, TextColumn

from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.answer_files import AnswerFolder
from beagle.training.answers import AnswerGenerator, Sample
from beagle.training.dialogues import answered
from beagle.training.folder import alone
from beagle.training.prompts import Prompt, answerable, has_template, numbered
from beagle.training.recipe import AnswerConfig
from beagle.training.states import Fingerprint, StateStore
from beagle.training.texts import TextReader, store_texts
from beagle.training.vllm_states import VllmStates


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
        filling = _Filling(target, store, config, console, skip_bad_lines, served)
        given, asked = divided(prompts, config)
        most = config.max_tokens
        if given:
            own = ceil(most * len(given) / len(prompts)) if most and asked else most
            filling.read(given, own)
            most = most - own if most and own else most
        if asked and answers:
            filling.read(asked, most, answers)
        elif todo := filling.unanswered(asked):
            filling.answer(todo)
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


@dataclass(frozen=True)
class _Filling:
    """Fills a store, and says what it does."""

    target: Target
    store: StateStore
    config: AnswerConfig
    console: Console
    skip_bad_lines: bool | None
    served: VllmStates | None

    def say(self, line: str) -> None:
        self.console.print(line, highlight=False, markup=False)

    def describe_states(self) -> None:
        """What ``answers.states`` costs at this width, and what the other choice would."""
        width = self.target.state_size
        gigabytes = 2 * width * 1e6 / 1e9  # bfloat16
        if self.config.states == "disk":
            self.say(
                f"states: {gigabytes:.2f} GB per million tokens at width {width} (answers.states: live stores none)"
            )
        else:
            self.say(
                "states: computed live, none stored; every epoch runs the target again "
                f"(answers.states: disk stores {gigabytes:.2f} GB per million tokens)"
            )

    def say_too_long(self, count: int) -> None:
        if count:
            self.say(
                f"{count} turns are longer than {self.config.max_prompt_tokens} tokens with what comes before them, and "
                "are left out (answers.max_prompt_tokens)"
            )

    def read(self, prompts: list[Prompt], most: int | None, answers: AnswerFolder | None = None) -> None:
        """Answers that exist, about ``most`` tokens: those of a folder, else those in the prompts' file."""
        config = self.config
        reader = TextReader(self.target, config)
        self.describe_states()
        texts = reader.stored(answers, prompts) if answers else reader.given(prompts, self.skip_bad_lines)
        store_texts(self.target, texts, self.store, self.console, max_tokens=most, seed=config.seed, served=self.served)
        for line in reader.left_out:
            self.say(line)
        self.say_too_long(reader.too_long)
        if reader.cut:
            self.say(
                f"{reader.cut} answers are longer than {config.max_new_tokens} tokens, and are cut there "
                "(answers.max_new_tokens)"
            )
        if not self.store.shards():
            raise BeagleError(
                f"no answer could be used: {reader.too_long} turns are longer than {config.max_prompt_tokens} tokens, the "
                "other answers are empty; raise answers.max_prompt_tokens or give other prompts"
            )

    def unanswered(self, prompts: list[Prompt]) -> list[Prompt]:
        """The prompts that the store lacks, none where it has enough tokens."""
        done, most = self.store.answered(), self.config.max_tokens
        todo = [prompt for prompt in prompts if prompt.key not in done]
        if not todo or (most and self.store.tokens() >= most):
            return []
        if not has_template(self.target):
            self.say(
                f"{self.target.name} has no chat template: prompts are taken as raw text, of each the first turn alone, "
                "without a system message"
            )
        with self.console.status("checking the prompts"):
            return answerable(self.target, todo, self.skip_bad_lines)

    def answer(self, todo: list[Prompt]) -> None:
        config, have = self.config, self.store.tokens()
        random.Random(config.seed).shuffle(todo)
        longest = (config.max_prompt_tokens + config.max_new_tokens) * len(todo) * config.max_turns
        self.describe_states()
        self.store.refuse_if_full(min(longest, (config.max_tokens or longest) - have))
        generator = AnswerGenerator(self.target, replace(config, rows=min(config.rows, len(todo))))
        starts = range(0, len(todo), 1024)  # similar lengths together: less padding
        chunks = (sorted(todo[at : at + 1024], key=lambda p: len(p.turns[0])) for at in starts)
        columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=self.console) as progress:
            task = progress.add_task("answers", total=config.max_tokens or None, completed=have, note="")

            def counted() -> Iterator[Sample]:
                tokens = have
                for answered, sample in enumerate(generator.run(chain.from_iterable(chunks)), 1):
                    tokens += len(sample.tokens)
                    progress.update(task, completed=tokens, note=f"{answered} answers, {tokens:,} tokens")
                    yield sample
                    if config.max_tokens and tokens >= config.max_tokens:
                        return

            self.store.write(counted())
        self.say_too_long(generator.too_long)
        if not self.store.shards():
            raise BeagleError(f"no prompt could be answered: {_reasons(generator, self.target)}")


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
