"""What a run has cost and how well its drafts were received."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

PARTS = ("prefill", "decode", "draft", "verify", "accept", "other")  # of an answer's time


@dataclass
class Stats:
    """Counts and times (seconds) of one or more answers.

    Attributes:
        tokens: generated tokens, EOS included, nothing past a limit.
        passes: target forward passes after prefill.
        passed_tokens: tokens those passes produced (the first token of an answer is prefill's).
        drafted: candidates verified, roots not counted.
        prefill_seconds: prompts, up to each answer's first token.
        decode_seconds: everything after prefill.
        draft_seconds: drafts, with what the drafter makes of the last pass's states.
        verify_seconds: the target's passes and LM head.
        accept_seconds: the walk through the tree and the cache's compaction.
        accepted_at: iterations by number of accepted draft tokens.
        accepted: accepted draft tokens of each pass of a single answer. ``add`` leaves it unchanged.
    """

    tokens: int = 0
    passes: int = 0
    passed_tokens: int = 0
    drafted: int = 0
    prefill_seconds: float = 0.0
    decode_seconds: float = 0.0
    draft_seconds: float = 0.0
    verify_seconds: float = 0.0
    accept_seconds: float = 0.0
    accepted_at: dict[int, int] = field(default_factory=dict)
    accepted: list[int] = field(default_factory=list)

    @property
    def tau(self) -> float:
        """Acceptance length: tokens per target pass after prefill, bonus token counted; >= 1."""
        return self.passed_tokens / self.passes if self.passes else 1.0

    @property
    def tokens_per_second(self) -> float:
        """Tokens after the first, over the time after prefill."""
        return self.passed_tokens / self.decode_seconds if self.decode_seconds else 0.0

    @property
    def other_seconds(self) -> float:
        """Time after prefill that is neither drafting nor verification nor acceptance."""
        return self.decode_seconds - self.draft_seconds - self.verify_seconds - self.accept_seconds

    def note_pass(self, accepted: int, tokens: int = 0, drafted: int = 0) -> None:
        """Count a pass.

        Args:
            accepted: draft tokens that it accepted.
            tokens: that it brought.
            drafted: candidates that it verified.
        """
        self.tokens += tokens
        self.passed_tokens += tokens
        self.drafted += drafted
        self.passes += 1
        self.accepted_at[accepted] = self.accepted_at.get(accepted, 0) + 1
        self.accepted.append(accepted)

    def reached(self, depth: int) -> int:
        """Iterations that accepted at least ``depth`` draft tokens."""
        return sum(n for d, n in self.accepted_at.items() if d >= depth)

    @property
    def step_alpha(self) -> list[float]:
        """α_j: share of iterations with at least j accepted tokens among those with at least j-1."""
        deepest = max(self.accepted_at, default=0)
        return [self.reached(j) / self.reached(j - 1) for j in range(1, deepest + 1)]

    def add(self, other: Stats) -> None:
        """Pool another answer's figures (τ of a run is over all its steps, not a mean of means)."""
        for name, value in vars(other).items():
            if isinstance(value, int | float):
                setattr(self, name, getattr(self, name) + value)
        for depth, n in other.accepted_at.items():
            self.accepted_at[depth] = self.accepted_at.get(depth, 0) + n

    def as_dict(self) -> dict[str, Any]:
        return {
            "tokens": self.tokens,
            "passes": self.passes,
            "tau": round(self.tau, 4),
            "step_alpha": [round(a, 4) for a in self.step_alpha],
            "accepted_at_depth": {str(d): self.accepted_at[d] for d in sorted(self.accepted_at)},
            "candidates_per_pass": round(self.drafted / self.passes, 2) if self.passes else 0.0,
            "tokens_per_second": round(self.tokens_per_second, 3),
            **{f"{part}_seconds": round(getattr(self, f"{part}_seconds"), 4) for part in PARTS},
        }


def pooled(parts: Iterable[Stats]) -> Stats:
    """Figures of several answers together."""
    total = Stats()
    for stats in parts:
        total.add(stats)
    return total
