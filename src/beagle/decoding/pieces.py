"""An answer as text, piece by piece or whole."""

from __future__ import annotations

from collections.abc import Generator, Iterator
from dataclasses import dataclass, field

from beagle.decoding.sequence import Emitted, FinishReason
from beagle.decoding.stats import Stats
from beagle.decoding.text import StopText


@dataclass(frozen=True)
class Piece:
    """A piece of a streamed answer, empty where a pass has shown nothing yet.

    Attributes:
        text: what this step adds to the text.
        token_ids: the step's tokens.
        drafted: how many of them, from the first on, were drafted.
        finish_reason: of the answer's last piece: ``stop`` (EOS, a stop token or a stop string) or ``length``.
    """

    text: str
    token_ids: list[int] = field(default_factory=list)
    drafted: int = 0
    finish_reason: FinishReason | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer.

    Attributes:
        text: without special tokens, stop tokens and stop strings.
        token_ids: all tokens, EOS or the stop token included, up to the one that completes a stop string.
        stats: what the answer has cost.
        finish_reason: ``stop`` (EOS, a stop token or a stop string) or ``length``.
    """

    text: str
    token_ids: list[int]
    stats: Stats
    finish_reason: FinishReason = "stop"

    @classmethod
    def of(cls, pieces: list[Piece], stats: Stats) -> Answer:
        """Put an answer together.

        Args:
            pieces: all of them, in order.
            stats: what they have cost.
        """
        ids = [token for piece in pieces for token in piece.token_ids]
        return cls("".join(piece.text for piece in pieces), ids, stats, pieces[-1].finish_reason or "length")


class Pieces:
    """Makes pieces of what the iterations emit."""

    def __init__(self, text: StopText, stats: Stats) -> None:
        self._text, self._stats = text, stats
        self._waiting: list[int] = []
        self._drafted = 0

    def take(self, step: Emitted) -> Piece:
        """The piece of one iteration: its text, and the tokens since the last piece that had some."""
        text, used = self._text.add(step.tokens, ends=step.finish_reason == "stop")
        surplus = len(step.tokens) - used
        self._stats.tokens -= surplus
        self._stats.passed_tokens -= surplus
        self._waiting += step.tokens[:used]
        self._drafted += min(step.drafted, used)
        reason = "stop" if self._text.stopped else step.finish_reason
        if reason is None and not text:
            return Piece("")  # so that callers can pause or stop between any two passes
        return self.rest(reason, text)

    def rest(self, reason: FinishReason | None, text: str = "") -> Piece:
        """The tokens that wait; at the end of the answer also the text that was held back."""
        piece = Piece(text + (self._text.finish() if reason else ""), self._waiting, self._drafted, reason)
        self._waiting, self._drafted = [], 0
        return piece


class Stream(Iterator[Piece]):
    """An answer under way: a piece for each pass of the target.

    Attributes:
        finish_reason: how the answer has ended, if it has.
    """

    def __init__(self, steps: Generator[Emitted, None, None], pieces: Pieces) -> None:
        self.finish_reason: FinishReason | None = None
        self._steps, self._pieces = steps, pieces

    def __next__(self) -> Piece:
        piece = self._pieces.take(next(self._steps))
        if piece.finish_reason is not None:
            self._end(piece.finish_reason)
        return piece

    def finish(self) -> Piece:
        """Cut the answer here: no more passes, and the text and tokens that were held back (reason ``length``)."""
        if self.finish_reason is not None:
            return Piece("", finish_reason=self.finish_reason)
        self._end("length")
        return self._pieces.rest("length")

    def close(self) -> None:
        """No more passes; what was held back is dropped."""
        self._steps.close()

    def _end(self, reason: FinishReason) -> None:
        self.finish_reason = reason
        self.close()
