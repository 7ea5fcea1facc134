"""One thread owns the model; requests take turns on it, a pass of the target each."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, wait
from dataclasses import dataclass, replace

from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.model import Model, Piece
from beagle.serving.metrics import Metrics
from beagle.serving.watching import Watcher
from beagle.serving.work import ChoiceEnd, Delta, Done, Event, Failed, Job, ServeError, Work
from beagle.targets.chat import encode
from beagle.threads import Owner

log = logging.getLogger("beagle.serving")


@dataclass(frozen=True)
class Limits:
    """What the server takes on.

    Attributes:
        live: requests that take turns; each holds one KV cache.
        queue: requests that wait for a turn; more are refused with 429.
        seconds: a request's time, waiting included; then its answer is cut.
        context: tokens of prompt and answer together; None is the target's own limit.
        answer: new tokens of a chat answer where the request names no number.
        body: bytes of a request's body.
        grace: seconds that live requests get to finish at shutdown.
    """

    live: int = 8
    queue: int = 32
    seconds: float = 300.0
    context: int | None = None
    answer: int = 1024
    body: int = 2**20
    grace: float = 10.0


class Engine:
    """Admits requests, and gives each live one a turn of one pass, round-robin.

    A request's choices are answered one after another, so that a request with many of them gets no
    more turns, and holds no more memory, than one with a single choice.
    """

    def __init__(
        self, model: Model, limits: Limits | None = None, *, exact: bool = False, owner: Owner | None = None
    ) -> None:
        """
        Args:
            owner: the thread that has loaded the model; one of its own if not given.
        """
        self.model, self.limits, self.exact = model, limits or Limits(), exact
        self.context = min(model.target.context_limit, self.limits.context or model.target.context_limit)
        self.metrics = Metrics(self)
        self._lock = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._live: deque[Job] = deque()
        self._closing = False
        self._close_at = math.inf
        self._mean_seconds = 1.0  # of a request; what Retry-After is told from
        self._owner = owner or Owner("beagle-engine")
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
            while self._turn():
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

    def _turn(self) -> bool:
        """Admit who can be, and let the next live request have its pass; False at the end."""
        with self._lock:
            while not self._waiting and not self._live and not self._closing:
                self._lock.wait()
        self._sort_out()
        # one that came in since then is still to be encoded: its turn comes with the next one
        while self._waiting and self._waiting[0].ids is not None and len(self._live) < self.limits.live:
            with self._lock:
                job = self._waiting.popleft()
                self._live.append(job)
            job.started = time.monotonic()
            job.turns = self._answer(job)
            self.metrics.queue_seconds.observe(job.started - job.submitted)
        if self._live:
            goes_on = self._advance(self._live[0])
            with self._lock:
                job = self._live.popleft()
                if goes_on:
                    self._live.append(job)
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

    def _advance(self, job: Job) -> bool:
        """One pass for a live request; False when it has ended, one way or another."""
        assert job.turns is not None
        now = time.monotonic()
        if job.cancelled:
            return self._fail(job, Failed(499, "the client went away"))
        if now > job.deadline or now > self._close_at:
            job.cut = True
            next(job.turns, None)
            for choice in range(job.current + 1, job.work.choices):
                job.send(ChoiceEnd(choice, "length"))
            return self._finish(job, "time" if now > job.deadline else "shutdown")
        try:
            next(job.turns)
        except StopIteration:
            return self._finish(job, None)
        except BeagleError as error:  # the request was checked: it is the model, whose logits are no numbers, say
            return self._fail(job, Failed(500, str(error), "model_error"))
        except Exception as error:  # out of memory, say: the others go on
            log.exception("a request failed")
            return self._fail(job, Failed(500, f"the request failed: {type(error).__name__}"))
        return True

    def _answer(self, job: Job) -> Iterator[None]:
        """All choices of a request, a pass of the target for each ``next``."""
        work = job.work
        model = self.model
        assert job.ids is not None
        for job.current in range(work.choices):
            which, repeat = divmod(job.current, work.n)
            watcher = None
            if work.watch or work.top is not None:
                watcher = Watcher(
                    model.target,
                    top=work.top,
                    trees=work.watch,
                    exact=self.exact,
                    before=job.ids[which] if work.continues else (),
                    ends={*work.sampling.stop_token_ids, *(() if work.sampling.ignore_eos else model.target.eos_ids)},
                )
            stats = Stats()
            pieces = model.stream(
                job.ids[which],
                replace(work.sampling, max_new_tokens=job.limit, seed=work.seed + repeat),
                continue_final_message=work.continues,
                exact=self.exact,
                draft=work.draft,
                stats=stats,
                watch=watcher,
            )
            try:
                while pieces.finish_reason is None:
                    piece = pieces.finish() if job.cut else next(pieces)
                    self._send(job, piece, watcher, stats)
                    if piece.finish_reason is None:  # else the end comes without another pass
                        yield
            finally:
                pieces.close()
                job.stats.add(stats)
            job.send(ChoiceEnd(job.current, pieces.finish_reason))
            if job.cut:
                return

    def _send(self, job: Job, piece: Piece, watcher: Watcher | None, stats: Stats) -> None:
        held = watcher is not None and piece.finish_reason is not None  # the last log-probabilities
        if not piece.token_ids and not piece.text and not held:
            return
        if piece.token_ids and job.first_token is None:
            job.first_token = time.monotonic()
            self.metrics.first_token_seconds.observe(job.first_token - job.submitted)
        logprobs = watched = None
        if watcher is not None:
            logprobs, watched = watcher.take(piece)
        if watched is not None:
            watched["tau"] = round(stats.tau, 4)
            watched["tokens_per_second"] = round(stats.tokens_per_second, 3)
        job.send(Delta(job.current, piece.text, len(piece.token_ids), piece.drafted, logprobs, watched))

    def _finish(self, job: Job, cut: str | None) -> bool:
        self._leave(job)
        job.send(Done(job.stats, job.prompt_tokens, job.started - job.submitted, cut))
        return False

    def _fail(self, job: Job, failure: Failed) -> bool:
        self._leave(job)
        job.send(failure)
        return False

    def _leave(self, job: Job) -> None:
        """Free what the request holds, and count what it has cost."""
        if job.turns is None:
            return
        job.turns.close()  # type: ignore[attr-defined]
        seconds = time.monotonic() - job.submitted
        self._mean_seconds += 0.2 * (seconds - self._mean_seconds)
        self.metrics.answered(job, seconds)
