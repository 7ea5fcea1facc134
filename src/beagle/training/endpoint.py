"""The target's answers from a server with OpenAI's API: many requests at once, into a folder of answers.

The server's tokens are taken where it gives them; else its text is tokenised again, and used if that is the same answer.
"""

from __future__ import annotations

import asyncio
import os
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any
from urllib.parse import urlsplit

import torch
from pydantic import ValidationError
from rich.console import Console
from rich.progress import Progress, TextColumn

from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.answer_files import AnswerFolder, AnswersManifest, StoredAnswer, prompt_key
from beagle.training.prompts import Prompt, answerable, has_template
from beagle.training.recipe import AnswerConfig
from beagle.training.replies import Reply, UnusableError, agreeing, answer_tokens

SAVE_ANSWERS = 500  # answers, or
SAVE_SECONDS = 30.0  # seconds, after which they are written
TRIES = 4  # prompts that are asked first, greedily, before all others
TRIED_TOKENS = 32  # of their answers
LEAST_AGREEMENT = 0.8  # of the server's greedy tokens with the target's own; two dtypes agree on more than 0.95
MOST_REASONS = 4  # that are shown
MOST_UNUSABLE = 20  # answers, beyond which there must be as many that can be used
# Not OpenAI's, but of vLLM, SGLang and our own server: token ids, and no settings of the model's generation_config.json.
EXTENSIONS: dict[str, Any] = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Endpoint:
    """A server with OpenAI's API, such as ``vllm serve``, SGLang, TGI or ``beagle serve``.

    Attributes:
        url: such as ``http://host:8000/v1``; ``/v1`` may be left out.
        model: its name there.
        patience: seconds without an answer after which it is given up.
    """

    url: str
    model: str
    patience: float = 300.0

    def __post_init__(self) -> None:
        """
        Raises:
            BeagleError: the url is no address.
        """
        try:
            parts = urlsplit(self.url)
            if parts.scheme not in ("http", "https") or not parts.hostname:
                raise ValueError("no http:// or https:// address")
            _ = parts.port
        except ValueError as error:
            raise BeagleError(f"endpoint '{self.url}': {error}; give one such as http://host:8000/v1") from error

    @property
    def base(self) -> str:
        """The address that paths are appended to."""
        return self.url if urlsplit(self.url).path.strip("/") else f"{self.url.rstrip('/')}/v1"


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
        folder: where the answers are kept.
        config: ``rows`` is the number of requests at once.
        console: shows the progress, and what was left out.
        skip_bad_lines: as of ``answerable``.
    Returns:
        The folder.
    Raises:
        BeagleError: the server is down, gives nothing for ``patience`` seconds, lacks the model, or serves another one;
            or no answer could be used. What has been answered is kept.
    """
    openai = _openai()
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

        run = _Run(openai, endpoint, target, config, found, show, stored, tokens)
        try:
            asyncio.run(run.all(todo))
        finally:
            run.save()
    for line in run.notes():
        console.print(line, highlight=False)
    if not any(stored.values()):
        raise BeagleError(f"'{endpoint.url}': {run.why_none()}")
    return found


def _openai() -> ModuleType:
    try:
        import openai
    except ImportError as error:
        raise BeagleError(
            "answers from an endpoint need the openai package; install it: pip install 'beagle-decoding[endpoint]'"
        ) from error
    return openai


def _finished(answers: list[StoredAnswer], prompt: Prompt, turns: int) -> bool:
    """Whether there is nothing more to ask of a dialogue."""
    return len(answers) >= min(len(prompt.turns), turns) or (bool(answers) and _text_ids(answers[-1]) == [])


def _text_ids(answer: StoredAnswer) -> list[int]:
    """The answer without the token that ends it."""
    return [int(token) for token in (answer.tokens[:-1] if answer.ended else answer.tokens)]


class _Run:
    """Requests to one server, and the answers that are on their way into the folder."""

    def __init__(
        self,
        openai: Any,
        endpoint: Endpoint,
        target: Target,
        config: AnswerConfig,
        folder: AnswerFolder,
        show: Callable[[int, int], None],
        stored: dict[str, list[StoredAnswer]],
        tokens: int,
    ) -> None:
        self.openai, self.endpoint, self.target, self.config, self.folder = openai, endpoint, target, config, folder
        self.show, self.stored, self.tokens = show, stored, tokens
        self.turns = config.max_turns if has_template(target) else 1
        self.extensions = dict(EXTENSIONS)  # that this server takes
        self.waiting: list[StoredAnswer] = []
        self.unusable: Counter[str] = Counter()
        self.answered = self.too_long = 0
        self.saved = self.newest = time.monotonic()
        self.agreement: float | None = None

    async def all(self, todo: list[Prompt]) -> None:
        """Ask everything; answers that are not saved yet are left in ``waiting``."""
        key = os.environ.get("OPENAI_API_KEY") or "none"
        timeout = self.openai.Timeout(None, connect=10.0)
        async with self.openai.AsyncOpenAI(
            base_url=self.endpoint.base, api_key=key, timeout=timeout, max_retries=10**6
        ) as client:
            await self._try(client.with_options(max_retries=3, timeout=self.endpoint.patience), todo)
            self.newest = time.monotonic()
            jobs = iter(todo)
            pending = {asyncio.create_task(self._work(client, jobs)) for _ in range(min(self.config.rows, len(todo)))}
            try:
                while pending:
                    left = self.newest + self.endpoint.patience - time.monotonic()
                    if left <= 0:
                        raise await self._given_up(client, todo)
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
                        f"'{self.endpoint.url}': {count} answers can't be used, more than can; {self.why_none()}"
                    ) from error
            except self.openai.APIStatusError as error:
                raise self._refusal(error) from error

    async def _dialogue(self, client: Any, prompt: Prompt) -> None:
        """Its turns that have no answer yet."""
        key = prompt_key(prompt)
        have = self.stored.setdefault(key, [])
        for turn in range(len(have), min(len(prompt.turns), self.turns)):
            ids, history = self._encode(prompt, have)
            if len(ids) > min(self.config.max_prompt_tokens, self.target.context_limit - 1):
                self.too_long += 1
                return
            drawn = f"{self.config.seed}/{prompt.key}"
            sampled = random.Random(drawn).random() < self.config.sampled_share
            temperature = self.config.temperature if sampled else 0.0
            seed = random.Random(f"{drawn}/{turn}").getrandbits(62)
            # one more than is trained on: the last token is not run, as in ``AnswerGenerator``
            most = min(self.config.max_new_tokens + 1, self.target.context_limit - len(ids))
            reply = await self._ask(client, prompt, history, ids, most, temperature, seed)
            tokens, ended = answer_tokens(reply, self.target, ids, most)
            answer = StoredAnswer(key, prompt.id, turn, temperature, ended, len(ids), torch.tensor(tokens))
            have.append(answer)
            self._keep(answer)
            if not _text_ids(answer):
                return

    def _encode(self, prompt: Prompt, have: list[StoredAnswer]) -> tuple[list[int], list[str]]:
        """Token ids up to the next turn, and the answers before it."""
        history = [self.target.tokenizer.decode(_text_ids(answer), skip_special_tokens=True) for answer in have]
        try:
            return prompt.encode(self.target, history), history
        except BeagleError as error:
            raise BeagleError(f"{prompt.name}: {error}") from error

    async def _ask(
        self, client: Any, prompt: Prompt, history: list[str], ids: list[int], most: int, temperature: float, seed: int
    ) -> Reply:
        """One request. The client repeats it if the server is busy, fails or can't be reached.

        Raises:
            UnusableError: the server doesn't take this prompt, or its answer has another form.
            openai.APIError: another error of the API.
        """
        options: dict[str, Any] = {"model": self.endpoint.model, "max_tokens": most, "temperature": temperature}
        options |= {"top_p": 1.0, "seed": seed, "extra_body": self.extensions}
        try:
            if has_template(self.target):
                answer = await client.chat.completions.create(messages=prompt.messages(history), **options)
            else:
                answer = await client.completions.create(prompt=ids, **options)
            return Reply.model_validate(answer.model_dump(warnings=False))
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            raise UnusableError(f"the server refuses it ({_one_line(error)})") from error
        except (self.openai.APIResponseValidationError, ValidationError, AttributeError, ValueError) as error:
            raise UnusableError("the server does not answer as OpenAI's API does") from error

    async def _try(self, client: Any, todo: list[Prompt]) -> None:
        """Find out with a few prompts whether the server is there, has the model, and which fields it takes; and
        whether its greedy answers are the target's.

        Raises:
            BeagleError: it isn't so.
        """
        right = count = 0
        longest = min(self.config.max_prompt_tokens, self.target.context_limit - 1 - TRIED_TOKENS)
        short = (prompt for prompt in todo if len(self._encode(prompt, [])[0]) <= longest)
        for prompt, _ in zip(short, range(TRIES), strict=False):
            ids, history = self._encode(prompt, [])
            try:
                reply = await self._first(client, prompt, history, ids)
                tokens, _ = answer_tokens(reply, self.target, ids, TRIED_TOKENS)
            except UnusableError as error:
                if "tokenised again" in str(error):
                    continue
                raise BeagleError(f"'{self.endpoint.url}', {prompt.name}: {error}; {_remedy(str(error))}") from error
            except self.openai.APIStatusError as error:
                raise await self._named(client, error) from error
            except self.openai.APIError as error:
                raise self._unreachable(error) from error
            right += agreeing(self.target, ids, tokens)
            count += len(tokens)
        if count:
            self.agreement = right / count
            if self.agreement < LEAST_AGREEMENT:
                raise BeagleError(
                    f"'{self.endpoint.url}': '{self.endpoint.model}' is another model than {self.target.name}: "
                    f"{self.agreement:.0%} of its greedy tokens are the target's; {REMEDY}"
                )

    async def _first(self, client: Any, prompt: Prompt, history: list[str], ids: list[int]) -> Reply:
        """A greedy answer; fields that the server refuses are sent no more."""
        while True:
            try:
                return await self._ask(client, prompt, history, ids, TRIED_TOKENS, 0.0, 0)
            except UnusableError as error:
                if not isinstance(error.__cause__, self.openai.APIStatusError) or not self.extensions:
                    raise
                named = [name for name in self.extensions if name in str(error.__cause__)]
                for name in named or list(self.extensions):
                    del self.extensions[name]

    async def _named(self, client: Any, error: Any) -> BeagleError:
        """A refusal, with the models that there are where the one asked for is not."""
        if error.status_code != 404:
            return self._refusal(error)
        try:
            names = [model.id for model in (await client.models.list()).data]
        except Exception:
            return BeagleError(f"'{self.endpoint.url}' is no endpoint of OpenAI's API ({_one_line(error)}); {ADDRESS}")
        shown = ", ".join(names[:8])
        return BeagleError(
            f"'{self.endpoint.url}' has no model '{self.endpoint.model}' ({_one_line(error)}); name one of: {shown}"
        )

    def _refusal(self, error: Any) -> BeagleError:
        remedy = "put its key into OPENAI_API_KEY" if error.status_code in (401, 403) else "see the server's log"
        return BeagleError(
            f"'{self.endpoint.url}' answers with status {error.status_code} ({_one_line(error)}); {remedy}, then run the "
            "same command again; nothing is lost"
        )

    def _unreachable(self, error: Any) -> BeagleError:
        if isinstance(error, self.openai.APITimeoutError):
            what = f"gave no answer in {self.endpoint.patience:g} seconds"
        else:
            what = f"can't be reached ({_one_line(error.__cause__ or error)})"
        return BeagleError(f"'{self.endpoint.url}' {what}; {ADDRESS}, then run the same command again; nothing is lost")

    async def _given_up(self, client: Any, todo: list[Prompt]) -> BeagleError:
        """Why nothing has come for so long, as far as one more request tells."""
        once = client.with_options(max_retries=0, timeout=min(10.0, self.endpoint.patience))
        ids, history = self._encode(todo[0], [])
        try:
            await self._ask(once, todo[0], history, ids, 1, 0.0, 0)
        except self.openai.APITimeoutError:
            pass
        except self.openai.APIStatusError as error:
            if error.status_code != 429:  # busy
                return self._refusal(error)
        except self.openai.APIError as error:
            return self._unreachable(error)
        except UnusableError:
            pass
        return BeagleError(
            f"'{self.endpoint.url}' gave no answer for {self.endpoint.patience:g} seconds; lower answers.rows (requests "
            "at once) or answers.max_new_tokens, then run the same command again; nothing is lost"
        )

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
        if self.agreement is not None:
            yield f"{self.agreement:.0%} of the endpoint's greedy tokens in a trial are the target's own"
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
        return f"{reason}; {_remedy(reason)}"


REMEDY = "serve the target itself, with its own tokenizer and chat template"
ADDRESS = "check the address and that the server runs"


def _remedy(reason: str) -> str:
    """What helps if answers can't be used."""
    if "cut the answer" in reason:
        return "raise the server's limits of length and time, or lower answers.max_new_tokens"
    if "no token ids" in reason:
        return "use a server that takes return_token_ids, such as vLLM"
    if "refuses it" in reason:
        return (
            "see the server's log; a limit of its context asks for a lower answers.max_prompt_tokens or max_new_tokens"
        )
    return REMEDY


def _one_line(error: Any) -> str:
    """A server's own message, or what an exception says."""
    body = getattr(error, "body", None)
    found = body.get("message") if isinstance(body, dict) else None
    text = str(found or error).strip()
    return (text.splitlines() or [type(error).__name__])[0][:200]
