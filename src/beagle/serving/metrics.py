"""Metrics for Prometheus. τ over any span of time is ``passed_tokens`` over ``passes``."""

from __future__ import annotations

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest

from beagle.serving.work import Job

SECONDS = (0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
MEAN_TOKEN_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1)


class Metrics:
    """Counters of one server, in a registry of their own so that several servers may share a process."""

    def __init__(self, live: Callable[[], int], waiting: Callable[[], int]) -> None:
        self.registry = registry = CollectorRegistry()
        self.requests = Counter(
            "beagle_requests", "Requests by path and status.", ["path", "status"], registry=registry
        )
        self.prompt_tokens = Counter("beagle_prompt_tokens", "Prompt tokens of admitted requests.", registry=registry)
        self.cached_tokens = Counter(
            "beagle_cached_prompt_tokens", "Prompt tokens whose keys were there.", registry=registry
        )
        self.tokens = Counter("beagle_generated_tokens", "Generated tokens.", registry=registry)
        self.passes = Counter("beagle_passes", "Target passes after prefill.", registry=registry)
        self.passed_tokens = Counter("beagle_passed_tokens", "Tokens that those passes brought.", registry=registry)
        self.drafted = Counter("beagle_drafted_tokens", "Candidates verified.", registry=registry)
        self.accepted = Counter(
            "beagle_accepted", "Passes that accepted a draft token at this depth.", ["depth"], registry=registry
        )
        self.seconds = Counter("beagle_engine_seconds", "Time by part of the work.", ["part"], registry=registry)
        self.queue_seconds = Histogram(
            "beagle_queue_seconds",
            "From a request's arrival to when it is answered.",
            buckets=SECONDS,
            registry=registry,
        )
        self.first_token_seconds = Histogram(
            "beagle_first_token_seconds", "From arrival to the first token.", buckets=SECONDS, registry=registry
        )
        self.request_seconds = Histogram(
            "beagle_request_seconds", "From arrival to the end of the answer.", buckets=SECONDS, registry=registry
        )
        self.token_seconds = Histogram(
            "beagle_token_seconds",
            "Mean time between two tokens of a request, what other requests take included.",
            buckets=MEAN_TOKEN_SECONDS,
            registry=registry,
        )
        self._tau = Gauge("beagle_tau", "Tokens per target pass after prefill, since the start.", registry=registry)
        self._tau.set(1.0)
        self._all_passes = self._all_passed = 0
        Gauge("beagle_live_requests", "Requests that are answered now.", registry=registry).set_function(live)
        Gauge("beagle_queue_length", "Requests that wait.", registry=registry).set_function(waiting)

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
        self._all_passes += stats.passes
        self._all_passed += stats.passed_tokens
        if self._all_passes:
            self._tau.set(self._all_passed / self._all_passes)
        self.request_seconds.observe(seconds)
        if job.first_token is not None and stats.tokens > 1:
            since_first = seconds - (job.first_token - job.submitted)
            self.token_seconds.observe(since_first / (stats.tokens - 1))

    def text(self) -> bytes:
        return generate_latest(self.registry)
