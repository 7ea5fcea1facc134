"""A choice seen closely: log-probabilities, draft depths and trees, aligned with the streamed text."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beagle.decoding.loop import Step
from beagle.model import Piece
from beagle.serving.work import TokenLogprob
from beagle.targets.target import Target


class Watcher:
    """Collects the steps of one choice (as ``decode``'s ``watch``) until their tokens are streamed.

    A piece's text can lag behind its tokens (half a character, a stop string that may be coming), and
    a piece can hold the tokens of several steps. So tokens are numbered, from 0, and a token's text
    may arrive in parts.
    """

    def __init__(self, target: Target, *, top: int | None, trees: bool) -> None:
        self.target, self.top, self.trees = target, top, trees
        self._states: list[Tensor] = []  # what each token not yet streamed was chosen from
        self._depths: list[int] = []  # draft depth of every token, 0 for the target's own
        self._steps: list[dict[str, Any]] = []
        self._ids: list[int] = []
        self._ends: list[int] = []  # where each token's text ends
        self._shown = self._at = 0  # characters shown, and the token that the next one belongs to

    def __call__(self, step: Step) -> None:
        if self.top is not None:
            self._states += step.states[step.path].unbind()
        if self.trees:
            self._depths += [*range(1, len(step.path)), 0]
            self._steps.append(
                {
                    "tokens": [self._token(token) for token in step.tokens],
                    "parents": step.shape.parents,
                    "path": step.path,
                }
            )

    def _token(self, token: int) -> str:
        return str(self.target.tokenizer.decode([token]))

    def logprobs(self, piece: Piece) -> list[TokenLogprob] | None:
        """Log-probabilities of a piece's tokens, if they are wanted."""
        if self.top is None:
            return None
        out = []
        for token in piece.token_ids:
            scores = self.target.logits(self._states.pop(0)).float().log_softmax(-1)
            best = torch.topk(scores, min(self.top, len(scores)))
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            out.append(
                TokenLogprob(
                    self._token(token),
                    max(float(scores[token]), -9999.0),  # JSON has no infinity
                    [(self._token(i), max(value, -9999.0)) for i, value in pairs],
                )
            )
        return out

    def watched(self, piece: Piece) -> dict[str, Any] | None:
        """A piece's text by token, and the trees of the passes since the last piece, if they are wanted.

        Returns:
            ``pieces``: of each token with new text its number ``i``, ``text`` and draft ``depth``.
            ``steps``: of each pass the tree's ``tokens`` (the root first), ``parents`` and the accepted
            ``path``, which brought ``len(path)`` tokens.
        """
        if not self.trees:
            return None
        for token in piece.token_ids:
            self._ids.append(token)
            text = self.target.tokenizer.decode(self._ids, skip_special_tokens=True)
            self._ends.append(max(len(text.rstrip("\ufffd")), self._ends[-1] if self._ends else 0))
        pieces = []
        text = piece.text
        while text:
            last = self._at >= len(self._ends) - 1
            size = len(text) if last else self._ends[self._at] - self._shown
            if size > 0:
                part, text = text[:size], text[size:]
                self._shown += len(part)
                pieces.append({"i": self._at, "text": part, "depth": self._depths[self._at]})
            if text:
                self._at += 1
        steps, self._steps = self._steps, []
        return {"pieces": pieces, "steps": steps}
