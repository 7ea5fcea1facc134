"""One choice of a request while it is decoded: its sequence, and what its tokens become."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace

from beagle.decoding.pieces import Piece, Pieces
from beagle.decoding.sampling import Sampler
from beagle.decoding.sequence import Emitted, Sequence
from beagle.decoding.text import StopText
from beagle.serving.watching import Watcher
from beagle.serving.work import Delta, Work
from beagle.targets.target import Target


class Choice:
    """Turns what the decoder emits into the request's events.

    Attributes:
        reason: how the choice has ended, if it has.
    """

    def __init__(self, target: Target, work: Work, number: int, ids: list[int], limit: int) -> None:
        self.reason: str | None = None
        self._number = number
        sampling = replace(work.sampling, max_new_tokens=limit, seed=work.seed + number % work.n)
        eos: Collection[int] = () if sampling.ignore_eos else target.eos_ids
        before = ids if work.continues else ()
        self._watcher: Watcher | None = None
        if work.watch or work.top is not None:
            ends = {*sampling.stop_token_ids, *eos}
            self._watcher = Watcher(target, top=work.top, trees=work.watch, before=before, ends=ends)
        sampler = Sampler(sampling, prompt=ids, eos_ids=target.eos_ids, name=target.name)
        self.sequence = Sequence(ids, limit, sampler, drafts=work.draft, watch=self._watcher)
        self._pieces = Pieces(StopText(target.tokenizer, sampling.stop, before), self.sequence.stats)

    def take(self, emitted: Emitted) -> Delta | None:
        """What an iteration adds to the choice; None if nothing is to be shown yet."""
        return self._delta(self._pieces.take(emitted))

    def cut(self) -> Delta | None:
        """End the choice here: what was held back of it."""
        return self._delta(self._pieces.rest("length"))

    def _delta(self, piece: Piece) -> Delta | None:
        self.reason = piece.finish_reason
        held = self._watcher is not None and self.reason is not None  # the last log-probabilities
        if not piece.token_ids and not piece.text and not held:
            return None
        logprobs = watched = None
        if self._watcher is not None:
            logprobs, watched = self._watcher.take(piece)
        if watched is not None:
            watched["tau"] = round(self.sequence.stats.tau, 4)
            watched["tokens_per_second"] = round(self.sequence.stats.tokens_per_second, 3)
        return Delta(self._number, piece.text, list(piece.token_ids), piece.drafted, logprobs, watched)
