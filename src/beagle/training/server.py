"""A server with OpenAI's API that serves the target: single requests, a trial of it, and why it can't be used."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import ValidationError

from beagle.errors import BeagleError, first_line, required
from beagle.targets.target import Target
from beagle.training.prompts import Prompt, has_template
from beagle.training.replies import Reply, UnusableError, agreeing, answer_tokens
from beagle.training.state_files import drop_file

TRIES = 4  # prompts that are asked first, greedily, before all others
TRIED_TOKENS = 32  # of their answers
LEAST_AGREEMENT = 0.8  # of the server's greedy tokens with the target's own; two dtypes agree on more than 0.95
# Not OpenAI's, but of vLLM, SGLang and our own server: token ids, and no settings of the model's generation_config.json.
EXTENSIONS: dict[str, Any] = {"return_token_ids": True, "top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0}


@dataclass(frozen=True)
class Endpoint:
    """A server with OpenAI's API, such as ``vllm serve``, SGLang, TGI or ``beagle serve``.

    Attributes:
        url: such as ``http://host:8000/v1``; ``/v1`` may be left out.
        model: its name there.
        patience: seconds without an answer after which it is given up.
        states: folder that the server writes hidden states of each request to, which are deleted; None: it writes none.
    """

    url: str
    model: str
    patience: float = 300.0
    states: Path | None = None

    def __post_init__(self) -> None:
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


class Server:
    """Requests to an endpoint.

    Attributes:
        openai: the package of that name, whose client repeats requests, with growing pauses.
        extensions: fields beyond OpenAI's that the server takes.
        agreement: share of its greedy tokens in the trial that are the target's own; None: no trial, or no answer.
    """

    def __init__(self, endpoint: Endpoint, target: Target) -> None:
        self.openai = required("openai", "endpoint", f"endpoint '{endpoint.url}'")
        self.endpoint, self.target = endpoint, target
        self.extensions = dict(EXTENSIONS)
        self.agreement: float | None = None

    def client(self) -> Any:
        """A client that tries for as long as it is let to; an asynchronous context."""
        key = os.environ.get("OPENAI_API_KEY") or "none"
        timeout = self.openai.Timeout(None, connect=10.0)
        return self.openai.AsyncOpenAI(base_url=self.endpoint.base, api_key=key, timeout=timeout, max_retries=10**6)

    async def ask(
        self, client: Any, prompt: Prompt, history: list[str], ids: list[int], most: int, temperature: float, seed: int
    ) -> Reply:
        """One request. The client repeats it if the server is busy, fails or can't be reached.

        Args:
            temperature: 0 is greedy.
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
            content = answer.model_dump(warnings=False)
            if self.endpoint.states:
                await asyncio.to_thread(drop_file, content, self.endpoint.states, self.endpoint.patience)
            return Reply.model_validate(content)
        except (self.openai.BadRequestError, self.openai.UnprocessableEntityError) as error:
            raise UnusableError(f"the server refuses it ({one_line(error)})") from error
        except (self.openai.APIResponseValidationError, ValidationError, AttributeError, ValueError) as error:
            raise UnusableError("the server does not answer as OpenAI's API does") from error

    async def trial(self, client: Any, prompts: list[Prompt], longest: int) -> None:
        """Find out with a few prompts whether the server is there, has the model, and which fields it takes; and
        whether its greedy answers are the target's.

        Raises:
            BeagleError: it isn't so.
        """
        right = count = 0
        client = client.with_options(max_retries=3, timeout=self.endpoint.patience)
        longest = min(longest, self.target.context_limit - 1 - TRIED_TOKENS)
        encoded = ((prompt, prompt.encode(self.target)) for prompt in prompts)
        for prompt, ids in islice(((prompt, ids) for prompt, ids in encoded if len(ids) <= longest), TRIES):
            try:
                reply = await self._greedy(client, prompt, ids)
                tokens, _ = answer_tokens(reply, self.target, ids, TRIED_TOKENS)
            except UnusableError as error:
                if "tokenised again" in str(error):
                    continue
                raise BeagleError(f"'{self.endpoint.url}', {prompt.name}: {error}; {remedy(str(error))}") from error
            except self.openai.APIError as error:
                raise await self._named(client, error) from error
            right += agreeing(self.target, ids, tokens)
            count += len(tokens)
        if count:
            self.agreement = right / count
            if self.agreement < LEAST_AGREEMENT:
                raise BeagleError(
                    f"'{self.endpoint.url}': '{self.endpoint.model}' is another model than {self.target.name}: "
                    f"{self.agreement:.0%} of its greedy tokens are the target's; {REMEDY}"
                )

    async def _greedy(self, client: Any, prompt: Prompt, ids: list[int]) -> Reply:
        """A greedy answer; fields that the server refuses are sent no more."""
        while True:
            try:
                return await self.ask(client, prompt, [], ids, TRIED_TOKENS, 0.0, 0)
            except UnusableError as error:
                if not isinstance(error.__cause__, self.openai.APIStatusError) or not self.extensions:
                    raise
                named = [name for name in self.extensions if name in str(error.__cause__)]
                for name in named or list(self.extensions):
                    del self.extensions[name]

    async def _named(self, client: Any, error: Any) -> BeagleError:
        """A refusal, with the models that there are where the one asked for is not."""
        if not isinstance(error, self.openai.NotFoundError):
            return self.failure(error)
        try:
            names = [model.id for model in (await client.models.list()).data]
        except Exception:
            return BeagleError(f"'{self.endpoint.url}' is no endpoint of OpenAI's API ({one_line(error)}); {ADDRESS}")
        shown = ", ".join(names[:8])
        return BeagleError(
            f"'{self.endpoint.url}' has no model '{self.endpoint.model}' ({one_line(error)}); name one of: {shown}"
        )

    def failure(self, error: Any) -> BeagleError:
        """What a status or a failed connection says."""
        helps = ADDRESS
        if isinstance(error, self.openai.APIStatusError):
            what = f"answers with status {error.status_code} ({one_line(error)})"
            helps = "put its key into OPENAI_API_KEY" if error.status_code in (401, 403) else "see the server's log"
        elif isinstance(error, self.openai.APITimeoutError):
            what = f"gave no answer in {self.endpoint.patience:g} seconds"
        else:
            what = f"can't be reached ({one_line(error.__cause__ or error)})"
        return BeagleError(f"'{self.endpoint.url}' {what}; {helps}, then run the same command again; nothing is lost")

    async def given_up(self, client: Any, prompt: Prompt) -> BeagleError:
        """Why nothing has come for so long, as far as one more request tells."""
        once = client.with_options(max_retries=0, timeout=min(10.0, self.endpoint.patience))
        try:
            await self.ask(once, prompt, [], prompt.encode(self.target), 1, 0.0, 0)
        except (self.openai.APITimeoutError, self.openai.RateLimitError, UnusableError):  # it is there, but busy
            pass
        except self.openai.APIError as error:
            return self.failure(error)
        return BeagleError(
            f"'{self.endpoint.url}' gave no answer for {self.endpoint.patience:g} seconds; lower answers.rows (requests "
            "at once) or answers.max_new_tokens, then run the same command again; nothing is lost"
        )


REMEDY = "serve the target itself, with its own tokenizer and chat template"
ADDRESS = "check the address and that the server runs"


def remedy(reason: str) -> str:
    if "cut the answer" in reason:
        return "raise the server's limits of length and time, or lower answers.max_new_tokens"
    if "no token ids" in reason:
        return "use a server that takes return_token_ids, such as vLLM"
    if "refuses it" in reason:
        return (
            "see the server's log; a limit of its context asks for a lower answers.max_prompt_tokens or max_new_tokens"
        )
    return REMEDY


def one_line(error: Any) -> str:
    """A server's own message, or what an exception says."""
    body = getattr(error, "body", None)
    found = body.get("message") if isinstance(body, dict) else None
    return first_line(found or error)[:200]
