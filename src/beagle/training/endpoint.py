"""The target's answers from a server with OpenAI's API: many requests at once, into a folder of answers.

The server's tokens are taken where it gives them; else its text is tokenised again, and used if that is the same answer.
"""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import Progress, TextColumn

from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.answer_files import AnswerFolder, AnswersManifest, StoredAnswer, prompt_key
from beagle.training.prompts import Prompt, answerable, has_template
from beagle.training.recipe import AnswerConfig
from beagle.training.replies import UnusableError, answer_tokens
from beagle.training.server import Endpoint, Server, remedy

SAVE_ANSWERS = 500  # answers, or
SAVE_SECONDS = 30.0  # seconds, after which they are written
MOST_REASONS = 4  # that are shown
MOST_UNUSABLE = 20  # answers, beyond which there must be as many that can be used


def fetch_answers(
    endpoint: Endpoint,
    target: Target,
    prompts: list[Prompt],
    folder: Path,
    config: AnswerConfig,
    console: Console,
    skip_bad_lines: bool | None = False,
) -> AnswerFolder:
    """Answers to the prompts from a server; run again after an interruption, it asks for what is missing.

    Whether an answer is sampled, and with which seed, depends on its prompt and ``config.seed`` alone, as in
    ``AnswerGenerator``. The server's key is read from the environment, ``OPENAI_API_KEY``.

    Args:
        endpoint: the server, which must serve this very model: its greedy answers are compared.
        target: the model whose answers they are to be; it encodes the prompts and generates nothing.
        prompts: what is asked; the same content is asked once.
    Raises:
        BeagleError: the server is down, gives nothing for ``patience`` seconds, lacks the model, or serves another one;
            or no answer could be used. What has been answered is kept.
    """
    server = Server(endpoint, target)
    settings = ("sampled_share", "temperature", "seed", "max_prompt_tokens", "max_new_tokens", "max_turns")
    sampling = {"model": endpoint.model, **{name: getattr(config, name) for name in settings}}
    found = AnswerFolder.create(folder, AnswersManifest.of(target, sampling))
    with console.status("checking the prompts"):
        asked = {prompt_key(prompt): prompt for prompt in reversed(answerable(target, prompts, skip_bad_lines))}
    stored: dict[str, list[StoredAnswer]] = {}
    tokens = 0
    for answer in found.read():
        stored.setdefault(answer.prompt, []).append(answer)
        tokens += answer.prompt_tokens + len(answer.tokens)
    turns = config.max_turns if has_template(target) else 1
    todo = [prompt for key, prompt in asked.items() if not _finished(stored.get(key, []), prompt, turns)]
    if not todo or (config.max_tokens and tokens >= config.max_tokens):
        return found
    random.Random(config.seed).shuffle(todo)
    columns = (*Progress.get_default_columns(), TextColumn("{task.fields[note]}"))
    with Progress(*columns, console=console) as progress:
        task = progress.add_task("answers", total=config.max_tokens or None, completed=tokens, note="")

        def show(answers: int, tokens: int) -> None:
            progress.update(task, completed=tokens, note=f"{answers} answers, {tokens:,} tokens")

        run = _Run(server, config, found, show, stored, tokens, turns)
        try:
            asyncio.run(run.all(todo))
        finally:
            run.save()
    for line in run.notes():
        console.print(line, highlight=False)
    if not any(stored.values()):
        raise BeagleError(f"'{endpoint.url}': {run.why_none()}")
    return found


def _finished(answers: list[StoredAnswer], prompt: Prompt, turns: int) -> bool:
    """Whether there is nothing more to ask of a dialogue."""
    return len(answers) >= min(len(prompt.turns), turns) or (bool(answers) and not answers[-1].text_ids)


@dataclass
class _Run:
    """Requests to one server, and the answers that are on their way into the folder."""

    server: Server
    config: AnswerConfig
    folder: AnswerFolder
    show: Callable[[int, int], None]
    stored: dict[str, list[StoredAnswer]]
    tokens: int
    turns: int
    waiting: list[StoredAnswer] = field(default_factory=list)
    unusable: Counter[str] = field(default_factory=Counter)
    answered: int = 0
    too_long: int = 0
    saved: float = field(default_factory=time.monotonic)
    newest: float = field(default_factory=time.monotonic)

    async def all(self, todo: list[Prompt]) -> None:
        """Ask everything; answers that are not saved yet are left in ``waiting``."""
        patience = self.server.endpoint.patience
        async with self.server.client() as client:
            await self.server.trial(client, todo, self.config.max_prompt_tokens)
            self.newest = time.monotonic()
            jobs = iter(todo)
            pending = {asyncio.create_task(self._work(client, jobs)) for _ in range(min(self.config.rows, len(todo)))}
            try:
                while pending:
                    left = self.newest + patience - time.monotonic()
                    if left <= 0:
                        raise await self.server.given_up(client, todo[0])
                    done, pending = await asyncio.wait(
                        pending, timeout=left, return_when=asyncio.FIRST_COMPLETED
                    )  # which retry until then
                    for task in done:
                        task.result()
            finally:
                for task in pending:
                    task.cancel()
                await asyncio.gather(*pending, return_exceptions=True)

    async def _work(self, client: Any, jobs: Iterator[Prompt]) -> None:
        """One dialogue after another."""
        for prompt in jobs:
            if self.config.max_tokens and self.tokens >= self.config.max_tokens:
                return
            try:
                await self._dialogue(client, prompt)
            except UnusableError as error:
                self.unusable[str(error)] += 1
                self.newest = time.monotonic()
                if (count := self.unusable.total()) > max(MOST_UNUSABLE, self.answered):
                    raise BeagleError(
                        f"'{self.server.endpoint.url}': {count} answers can't be used, more than can; {self.why_none()}"
                    ) from error
            except self.server.openai.APIStatusError as error:
                raise self.server.failure(error) from error

    async def _dialogue(self, client: Any, prompt: Prompt) -> None:
        """Its turns that have no answer yet."""
        target, key = self.server.target, prompt_key(prompt)
        have = self.stored.setdefault(key, [])
        for turn in range(len(have), min(len(prompt.turns), self.turns)):
            history = [target.tokenizer.decode(answer.text_ids, skip_special_tokens=True) for answer in have]
            ids = prompt.encode(target, history)
            if len(ids) > min(self.config.max_prompt_tokens, target.context_limit - 1):
                self.too_long += 1
                return
            temperature, seed = self.config.drawn(prompt.key, turn)
            # one more than is trained on: the last token is not run, as in ``AnswerGenerator``
            most = min(self.config.max_new_tokens + 1, target.context_limit - len(ids))
            reply = await self.server.ask(client, prompt, history, ids, most, temperature, seed)
            tokens, ended = answer_tokens(reply, target, ids, most)
            answer = StoredAnswer(key, prompt.id, turn, temperature, ended, len(ids), torch.tensor(tokens))
            have.append(answer)
            self._keep(answer)
            if not answer.text_ids:
                return

    def _keep(self, answer: StoredAnswer) -> None:
        self.waiting.append(answer)
        self.answered += 1
        self.tokens += answer.prompt_tokens + len(answer.tokens)
        self.newest = time.monotonic()
        self.show(self.answered, self.tokens)
        if len(self.waiting) >= SAVE_ANSWERS or self.newest - self.saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Write what has come since the last time."""
        self.folder.append(self.waiting)
        self.waiting.clear()
        self.saved = time.monotonic()

    def notes(self) -> Iterator[str]:
        """What a reader should know of the answers, a line each."""
        if self.server.agreement is not None:
            yield f"{self.server.agreement:.0%} of the endpoint's greedy tokens in a trial are the target's own"
        if self.too_long:
            yield (
                f"{self.too_long} turns are longer than {self.config.max_prompt_tokens} tokens with what comes before "
                "them, and are not asked (answers.max_prompt_tokens)"
            )
        for reason, count in self.unusable.most_common(MOST_REASONS):
            yield f"{count} answers are left out: {reason}"
        if len(self.unusable) > MOST_REASONS:  # a server's own words may have numbers in them
            rest = self.unusable.total() - sum(count for _, count in self.unusable.most_common(MOST_REASONS))
            yield f"{rest} answers are left out for other reasons"

    def why_none(self) -> str:
        """Why hardly any answer could be used, and what helps."""
        if not self.unusable:
            return f"no prompt has at most {self.config.max_prompt_tokens} tokens; raise answers.max_prompt_tokens"
        (reason, _), *_ = self.unusable.most_common(1)
        return f"{reason}; {remedy(reason)}"
