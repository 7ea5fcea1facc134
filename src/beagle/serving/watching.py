"""A choice seen closely: log-probabilities, draft depths and trees, aligned with the streamed text."""

from __future__ import annotations

from collections import deque
from collections.abc import Collection, Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from beagle.decoding.pieces import Piece
from beagle.decoding.sequence import Step
from beagle.serving.token_texts import TokenText, TokenTexts, first_characters
from beagle.serving.work import Alternative, TokenLogprob
from beagle.targets.target import Target

LEAST = -9999.0  # JSON has no infinity


class Watcher:
    """Collects the steps of one choice (as a sequence's ``watch``) until their tokens are streamed.

    A piece's text can lag behind its tokens (half a character, a stop string that may be coming), and
    a piece can hold the tokens of several steps. So tokens are numbered, from 0, and a token's text
    may arrive in parts.
    """

    def __init__(
        self,
        target: Target,
        *,
        top: int | None,
        trees: bool,
        before: Sequence[int] = (),
        ends: Collection[int] = (),
    ) -> None:
        """
        Args:
            top: alternatives to report with each token's log-probability; None reports neither.
        """
        self.target, self.top, self.trees = target, top, trees
        self._logits: deque[Tensor] = deque()  # of tokens that have not been streamed
        self._depths: list[int] = []  # draft depth of every token, 0 for the target's own
        self._steps: list[dict[str, Any]] = []
        self._texts = TokenTexts(target.tokenizer, before, ends)
        self._starts: list[int] = []  # where each token's text begins
        self._held: deque[tuple[TokenLogprob, int]] = deque()  # whose text has not been streamed, and where it ends
        self._shown = self._at = 0  # characters streamed, and the token that the next one belongs to

    def __call__(self, step: Step) -> None:
        if self.top is not None:
            self._logits += step.logits[step.path].unbind()
        if self.trees:
            self._depths += [*range(1, len(step.path)), 0]
            self._steps.append(
                {
                    "tokens": [str(self.target.tokenizer.decode([token])) for token in step.tokens],
                    "parents": step.shape.parents,
                    "path": step.path,
                }
            )

    def take(self, piece: Piece) -> tuple[list[TokenLogprob] | None, dict[str, Any] | None]:
        """What is wanted to be known of a piece.

        Returns:
            The log-probabilities of the tokens whose text is complete with this piece, and the trees:
            ``pieces``: of each token with new text its number ``i``, ``text`` and draft ``depth``.
            ``steps``: of each pass since the last piece the tree's ``tokens`` (the root first), ``parents``
            and the accepted ``path``, which brought ``len(path)`` tokens.
        """
        for token in piece.token_ids:
            scores = self._logits.popleft().float().log_softmax(-1) if self.top is not None else None
            other = [] if scores is None else self._likeliest(scores, token)
            looks = {i: self._texts.look(i) for i in other if i != token}
            own = self._texts.add(token)
            self._starts.append(own.start)
            if scores is not None:
                top = self._alternatives(scores, other, looks | {token: own}, token)
                logprob = max(float(scores[token]), LEAST)
                self._held.append((TokenLogprob(own.text, logprob, own.content, top, own.start), own.end))
        pieces = self._parts(piece.text)
        return (
            self._complete(piece.finish_reason is not None) if self.top is not None else None,
            self._trees(pieces) if self.trees else None,
        )

    def _likeliest(self, scores: Tensor, token: int) -> list[int]:
        """The token and so many others as are wanted, the likeliest first, of equals the token."""
        assert self.top is not None
        best = torch.topk(scores, min(self.top, len(scores))).indices.tolist()
        return sorted({*best, token}, key=lambda i: (-float(scores[i]), i != token, i))

    def _alternatives(
        self, scores: Tensor, tokens: list[int], texts: dict[int, TokenText], chosen: int
    ) -> list[Alternative]:
        """Tokens of the same text get names of their own, the chosen one keeps its text."""
        names = {texts[chosen].text: chosen}
        for token in tokens:
            if token != chosen:
                tried = (texts[token].text, self._texts.name(token), f"token_id:{token}")
                names[next(name for name in tried if name not in names)] = token
        named = {token: name for name, token in names.items()}
        return [Alternative(named[i], max(float(scores[i]), LEAST), texts[i].content) for i in tokens]

    def _complete(self, ended: bool) -> list[TokenLogprob]:
        """Tokens whose text has been streamed; at the answer's end all, with what of their text is in the answer."""
        out = []
        while self._held and (ended or self._held[0][1] <= self._shown):
            token, _ = self._held.popleft()
            content = first_characters(token.content, self._shown - token.start)
            out.append(replace(token, content=content, start=min(token.start, self._shown)))
        return out

    def _parts(self, text: str) -> list[dict[str, Any]]:
        """A piece's text by token."""
        parts = []
        while text:
            while self._at + 1 < len(self._starts) and self._starts[self._at + 1] <= self._shown:
                self._at += 1
            last = self._at + 1 >= len(self._starts)
            size = len(text) if last else self._starts[self._at + 1] - self._shown
            part, text = text[:size], text[size:]
            self._shown += len(part)
            if self.trees:
                parts.append({"i": self._at, "text": part, "depth": self._depths[self._at]})
        return parts

    def _trees(self, pieces: list[dict[str, Any]]) -> dict[str, Any]:
        steps, self._steps = self._steps, []
        return {"pieces": pieces, "steps": steps}
