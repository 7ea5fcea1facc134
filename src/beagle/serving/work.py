"""What passes between a request's handler and the engine: the work, and the events it brings."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from beagle.decoding.sampling_params import SamplingParams
from beagle.decoding.stats import Stats
from beagle.targets.chat import Message

PromptInput = str | list[Message] | list[int]


@dataclass(frozen=True)
class Work:
    """One request, checked as far as that goes without the tokenizer.

    Attributes:
        prompts: each is answered ``n`` times, with seeds counting up from ``seed``.
        sampling: how tokens are chosen and where answers end, but for seed and length.
        continues: go on with a dialogue's last message instead of answering it.
        max_new_tokens: None is the server's default, within the context.
        top: alternatives to report with each token's log-probability; None reports neither.
        return_token_ids: give the ids of the answer's tokens, too.
        watch: report every pass's tree and every token's draft depth.
    """

    prompts: list[PromptInput]
    seed: int
    raw: bool = False
    n: int = 1
    max_new_tokens: int | None = None
    sampling: SamplingParams = field(default_factory=SamplingParams)
    continues: bool = False
    draft: bool = True
    top: int | None = None
    watch: bool = False
    return_token_ids: bool = False

    @property
    def choices(self) -> int:
        return len(self.prompts) * self.n


@dataclass(frozen=True)
class Alternative:
    """A token that could have come, its log-probability there, and its UTF-8."""

    token: str
    logprob: float
    content: bytes


@dataclass(frozen=True)
class TokenLogprob:
    """A token of an answer.

    Attributes:
        logprob: under the target, at temperature 1.
        content: UTF-8 of what it has added to the answer's text.
        top: the likeliest tokens there, the likeliest first and of equals the answer's; its own is among them.
        start: characters of the text before it.
    """

    token: str
    logprob: float
    content: bytes
    top: list[Alternative]
    start: int


@dataclass(frozen=True)
class Delta:
    """What a pass adds to one choice. ``watched``: see ``serving.watching``."""

    choice: int
    text: str
    token_ids: list[int]
    drafted: int
    logprobs: list[TokenLogprob] | None = None
    watched: dict[str, Any] | None = None


@dataclass(frozen=True)
class ChoiceEnd:
    """A choice is complete: ``stop`` (end of the answer, or a stop string) or ``length``."""

    choice: int
    reason: str


@dataclass(frozen=True)
class Done:
    """Last event of an answered request.

    Attributes:
        cached_tokens: tokens of the prompts that were not run, since their keys were there.
        cut: what ended it early (``time``, ``shutdown``), if anything.
    """

    stats: Stats
    prompt_tokens: int
    cached_tokens: int
    queue_seconds: float
    cut: str | None = None


@dataclass(frozen=True)
class Failed:
    """Last event of a request that came to nothing; ``status`` is HTTP's, 499 for a client that went away."""

    status: int
    message: str
    code: str | None = None
    retry_after: int | None = None


Event = Delta | ChoiceEnd | Done | Failed


class ServeError(Exception):
    """A refusal, as the client gets it."""

    def __init__(self, failure: Failed, param: str | None = None) -> None:
        super().__init__(failure.message)
        self.failure, self.param = failure, param


class Job:
    """A request on its way through the engine, which owns everything here but ``cancelled``."""

    def __init__(self, work: Work, send: Callable[[Event], None], seconds: float) -> None:
        self.work = work
        self.send = send
        self.submitted = time.monotonic()
        self.deadline = self.submitted + seconds
        self.cancelled = False
        self.ids: list[list[int]] | None = None  # the prompts' tokens, once encoded
        self.limit = 0  # new tokens of each choice
        self.started = 0.0
        self.first_token: float | None = None
        self.current = 0  # the choice under way
        self.cached_tokens = 0
        self.stats = Stats()

    def cancel(self) -> None:
        """The client went away: stop before the next pass. Safe from any thread."""
        self.cancelled = True

    @property
    def prompt_tokens(self) -> int:
        return sum(map(len, self.ids or ()))
