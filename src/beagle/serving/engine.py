"""One thread owns the model; live requests share its passes."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, wait
from dataclasses import dataclass

from beagle.decoding.decoder import Decoder
from beagle.decoding.prefixes import PrefixCache
from beagle.decoding.sequence import Emitted
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.serving.choice import Choice
from beagle.serving.metrics import Metrics
from beagle.serving.work import ChoiceEnd, Delta, Done, Event, Failed, Job, ServeError, Work
from beagle.targets.chat import encode
from beagle.threads import ModelThread

PIECE = 512  # tokens of a prompt that run between two passes of the answers that are live
log = logging.getLogger("beagle.serving")


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        live: requests that are answered at once.
        queue: requests that wait; more are refused with 429.
        seconds: a request's time, waiting included; then its answer is cut.
        context: tokens of prompt and answer together; None is the target's own limit.
        answer: new tokens of a chat answer where the request names no number.
        body: bytes of a request's body.
        grace: seconds that live requests get to finish at shutdown.
        prefix_cache: tokens of ended answers whose keys are kept for prompts that begin as they did; 0 keeps none.
    """

    live: int = 8
    queue: int = 32
    seconds: float = 300.0
    context: int | None = None
    answer: int = 1024
    body: int = 2**20
    grace: float = 10.0
    prefix_cache: int = 8192


class Engine:
    """Admits requests; the live ones decode together (continuous batching).

    A request's choices are answered one after another, so that a request with many of them takes no
    more time of others, and no more memory, than one with a single choice.
    """

    def __init__(
        self, model: Model, limits: Limits | None = None, *, exact: bool = False, owner: ModelThread | None = None
    ) -> None:
        """
        Args:
            owner: the thread that has loaded the model; one of its own if not given.
        """
        self.model, self.limits, self.exact = model, limits or Limits(), exact
        self.context = min(model.target.context_limit, self.limits.context or model.target.context_limit)
        self.metrics = Metrics(lambda: self.live, lambda: self.waiting)
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._live: dict[Job, Choice] = {}
        self._closing = False
        self._close_at = math.inf
        self._mean_seconds = 1.0  # of a request; Retry-After follows from it
        self._owner = owner or ModelThread("beagle-engine")
        self._ended: Future[None] | None = None

    def start(self) -> None:
        self._ended = self._owner.submit(self._run)

    @property
    def healthy(self) -> bool:
        return self._ended is not None and not self._ended.done() and not self._closing

    @property
    def live(self) -> int:
        return len(self._live)

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    def submit(self, work: Work, send: Callable[[Event], None]) -> Job:
        """Take on a request; ``send`` is called from the engine's thread, last with ``Done`` or ``Failed``.

        Raises:
            ServeError: too many requests, or the server is closing.
        """
        job = Job(work, send, self.limits.seconds)
        with self._lock:
            if not self.healthy:
                raise ServeError(Failed(503, "the server is shutting down", "shutting_down"))
            if len(self._waiting) + len(self._live) >= self.limits.live + self.limits.queue:
                raise ServeError(self._busy(f"{self.limits.queue} requests are waiting already; try again later"))
            self._waiting.append(job)
            self._lock.notify()
        return job

    def close(self) -> None:
        """Refuse what is new or waiting, let live requests finish within the grace; returns at once."""
        with self._lock:
            if not self._closing:
                self._closing, self._close_at = True, time.monotonic() + self.limits.grace
            self._lock.notify()

    def join(self, timeout: float | None = None) -> bool:
        """Wait for the last turn after ``close``; False if it hasn't ended in time."""
        return self._ended is None or bool(wait([self._ended], timeout).done)

    def _busy(self, message: str) -> Failed:
        ahead = (len(self._waiting) + 1) / self.limits.live
        return Failed(429, message, "rate_limit_exceeded", min(60, math.ceil(self._mean_seconds * ahead)))

    # what follows runs in the engine's thread only

    def _run(self) -> None:
        try:
            prefixes = PrefixCache(self.limits.prefix_cache) if self.limits.prefix_cache else None
            decoder = self.model.decoder(self.limits.live, exact=self.exact, prefixes=prefixes, piece=PIECE)
            while self._turn(decoder):
                pass
        except BaseException:
            log.exception("the engine stopped")
            with self._lock:
                self._closing = True
                stranded = [*self._waiting, *self._live]
                self._waiting.clear()
                self._live.clear()
            for job in stranded:
                job.send(Failed(500, "the engine stopped", "engine_stopped"))

    def _turn(self, decoder: Decoder) -> bool:
        """Admit who can be, and one step of all that are live; False at the end."""
        with self._lock:
            while not self._waiting and not self._live and not self._closing:
                self._lock.wait()
        self._sort_out()
        # one that came in since then is still to be encoded: it is admitted at the next step
        while self._waiting and self._waiting[0].ids is not None and len(self._live) < self.limits.live:
            job = self._waiting[0]
            choice = self._choice(job)
            with self._lock:
                self._waiting.popleft()
                self._live[job] = choice
            job.started = time.monotonic()
            self.metrics.queue_seconds.observe(job.started - job.submitted)
            decoder.enter([choice.sequence])
        self._end_early(decoder)
        jobs = {choice.sequence: job for job, choice in self._live.items()}
        for sequence, emitted in decoder.step():
            self._take(decoder, jobs[sequence], emitted)
        return bool(self._live or self._waiting) or not self._closing

    def _sort_out(self) -> None:
        """Encode new requests, so that bad ones fail at once; drop those that wait in vain."""
        with self._lock:
            waiting = list(self._waiting)
        for job in waiting:
            failure = None
            if job.cancelled:
                failure = Failed(499, "the client went away")
            elif self._closing:
                failure = Failed(503, "the server is shutting down", "shutting_down")
            elif time.monotonic() > job.deadline:
                failure = self._busy("the request waited in vain for its whole time; try again later")
            elif job.ids is None:
                failure = self._encode(job)
            if failure is not None:
                with self._lock:
                    self._waiting.remove(job)
                self._fail(job, failure)

    def _encode(self, job: Job) -> Failed | None:
        work = job.work
        try:
            work.sampling.check_vocabulary(self.model.target.vocab_size)
            ids = [
                encode(self.model.target, prompt, raw=work.raw, continue_final_message=work.continues)
                for prompt in work.prompts
            ]
        except BeagleError as error:
            return Failed(400, str(error), "invalid_prompt")
        except Exception:
            log.exception("a prompt could not be encoded")
            return Failed(500, "the prompt could not be encoded")
        longest = max(map(len, ids))
        if not all(ids):
            return Failed(400, "the prompt has no tokens; give some text to answer", "invalid_prompt")
        room = self.context - longest
        if room < 1 or room < (work.max_new_tokens or 1):
            asked = f" and {work.max_new_tokens} new ones were asked for" if work.max_new_tokens else ""
            message = f"the context is {self.context} tokens; the prompt has {longest}{asked}; ask for less"
            return Failed(400, message, "context_length_exceeded")
        job.ids = ids
        job.limit = work.max_new_tokens or min(self.limits.answer, room)
        if work.sampling.min_new_tokens > job.limit:
            message = (
                f"min_tokens is {work.sampling.min_new_tokens}, and an answer has {job.limit} at most; ask for less"
            )
            return Failed(400, message, "invalid_request")
        return None

    def _choice(self, job: Job) -> Choice:
        assert job.ids is not None
        ids = job.ids[job.current // job.work.n]
        return Choice(self.model.target, job.work, job.current, ids, job.limit)

    def _end_early(self, decoder: Decoder) -> None:
        """End requests whose client went away or whose time is over."""
        now = time.monotonic()
        for job, choice in list(self._live.items()):
            if job.cancelled:
                decoder.leave(choice.sequence)
                self._fail(job, Failed(499, "the client went away"))
            elif now > job.deadline or now > self._close_at:
                decoder.leave(choice.sequence)
                self._send(job, choice.cut())
                for number in range(job.current, job.work.choices):
                    job.send(ChoiceEnd(number, "length"))
                self._finish(job, "time" if now > job.deadline else "shutdown")

    def _take(self, decoder: Decoder, job: Job, emitted: Emitted) -> None:
        """What a step has brought for a live request; its next choice where one is complete."""
        choice = self._live[job]
        error = choice.sequence.error
        if error is None:
            try:
                delta = choice.take(emitted)
            except Exception as raised:
                error = raised
        if error is not None:
            decoder.leave(choice.sequence)
            self._fail(job, self._failure(error))
            choice.sequence.error = None  # its traceback holds the sequence and its keys
            return
        self._send(job, delta)
        if choice.reason is None:
            return
        decoder.leave(choice.sequence)
        job.send(ChoiceEnd(job.current, choice.reason))
        if job.current + 1 == job.work.choices:
            self._finish(job, None)
            return
        self._count(job, choice)
        job.current += 1
        following = self._live[job] = self._choice(job)
        decoder.enter([following.sequence])

    @staticmethod
    def _failure(error: Exception) -> Failed:
        if isinstance(error, BeagleError):  # the request was checked: it is the model, whose logits are no numbers, say
            return Failed(500, str(error), "model_error")
        log.error("a request failed", exc_info=error)  # out of memory, say: the others go on
        return Failed(500, f"the request failed: {type(error).__name__}")

    def _send(self, job: Job, delta: Delta | None) -> None:
        if delta is None:
            return
        if delta.token_ids and job.first_token is None:
            job.first_token = time.monotonic()
            self.metrics.first_token_seconds.observe(job.first_token - job.submitted)
        job.send(delta)

    def _count(self, job: Job, choice: Choice) -> None:
        """Add what a choice has cost to its request's."""
        job.stats.add(choice.sequence.stats)
        if job.current % job.work.n == 0:  # a prompt counts once, and later choices find what the first one ran
            job.cached_tokens += choice.sequence.cached_tokens

    def _finish(self, job: Job, cut: str | None) -> None:
        self._leave(job)
        job.send(Done(job.stats, job.prompt_tokens, job.cached_tokens, job.started - job.submitted, cut))

    def _fail(self, job: Job, failure: Failed) -> None:
        self._leave(job)
        job.send(failure)

    def _leave(self, job: Job) -> None:
        """Count what a live request has cost."""
        with self._lock:
            choice = self._live.pop(job, None)
        if choice is None:
            return
        self._count(job, choice)
        seconds = time.monotonic() - job.submitted
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        self.metrics.answered(job, seconds)
