"""Metrics for Prometheus. τ over any span of time is ``passed_tokens`` over ``passes``."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from beagle.decoding.stats import Stats
from beagle.serving.work import Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MEAN_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server, in a registry of their own so that several servers may share a process."""

    def __init__(self, live: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = CollectorRegistry()
        counter, gauge = partial(Counter, registry=self.registry), partial(Gauge, registry=self.registry)
        seconds = partial(Histogram, buckets=SECONDS, registry=self.registry)
        self.requests = counter("beagle_requests", "Requests by path and status.", ["path", "status"])
        self.prompt_tokens = counter("beagle_prompt_tokens", "Prompt tokens of admitted requests.")
        self.cached_tokens = counter("beagle_cached_prompt_tokens", "Prompt tokens whose keys were there.")
        self.tokens = counter("beagle_generated_tokens", "Generated tokens.")
        self.passes = counter("beagle_passes", "Target passes after prefill.")
        self.passed_tokens = counter("beagle_passed_tokens", "Tokens that those passes brought.")
        self.drafted = counter("beagle_drafted_tokens", "Candidates verified.")
        self.accepted = counter("beagle_accepted", "Passes that accepted a draft token at this depth.", ["depth"])
        self.seconds = counter("beagle_engine_seconds", "Time by part of the work.", ["part"])
        self.queue_seconds = seconds("beagle_queue_seconds", "From a request's arrival to when it is answered.")
        self.first_token_seconds = seconds("beagle_first_token_seconds", "From arrival to the first token.")
        self.request_seconds = seconds("beagle_request_seconds", "From arrival to the end of the answer.")
        self.token_seconds = seconds(
            "beagle_token_seconds",
            "Mean time between two tokens of a request, what other requests take included.",
            buckets=MEAN_TOKEN_SECONDS,
        )
        self._all = Stats()
        gauge("beagle_tau", "Tokens per target pass after prefill, since the start.").set_function(
            lambda: self._all.tau
        )
        gauge("beagle_live_requests", "Requests that are answered now.").set_function(live)
        gauge("beagle_queue_length", "Requests that wait.").set_function(waiting)

    def answered(self, job: Job, seconds: float) -> None:
        """Count a request that was admitted, however it ended."""
        stats = job.stats
        self.prompt_tokens.inc(job.prompt_tokens)
        self.cached_tokens.inc(job.cached_tokens)
        self.tokens.inc(stats.tokens)
        self.passes.inc(stats.passes)
        self.passed_tokens.inc(stats.passed_tokens)
        self.drafted.inc(stats.drafted)
        for depth in range(1, max(stats.accepted_at, default=0) + 1):
            self.accepted.labels(depth).inc(stats.reached(depth))
        for part, spent in (
            ("prefill", stats.prefill_seconds), ("draft", stats.draft_seconds), ("verify", stats.verify_seconds)
        ):  # fmt: skip
            self.seconds.labels(part).inc(spent)
        self._all.add(stats)
        self.request_seconds.observe(seconds)
        if job.first_token is not None and stats.tokens > 1:
            since_first = seconds - (job.first_token - job.submitted)
            self.token_seconds.observe(since_first / (stats.tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
