"""How the next token is chosen, the same way with and without drafts."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beagle.errors import BeagleError


class Sampler:
    """Chooses the target's token at a position of the answer.

    Each position of the answer owns one uniform number, drawn from the seed beforehand; the token
    is where it falls in the cumulative distribution. A tree node at depth d is judged with the
    number of the position it would take, so drafts cannot change the answer: the same seed gives
    the same text with and without them, and each token follows the target's own distribution.
    """

    def __init__(
        self, *, temperature: float = 0.0, top_k: int = 0, top_p: float = 1.0, seed: int = 0, length: int = 0
    ) -> None:
        """
        Args:
            temperature: 0 is greedy. top_k: 0 is off. top_p: 1 is off. length: positions to draw for.
        """
        if temperature < 0 or top_k < 0 or not 0 < top_p <= 1:
            raise BeagleError("temperature must be >= 0, top_k >= 0 and 0 < top_p <= 1; correct the sampling options")
        self.temperature, self.top_k, self.top_p = temperature, top_k, top_p
        random = torch.Generator().manual_seed(seed)
        self._uniform = torch.rand(length, generator=random, dtype=torch.float64).tolist() if temperature else []

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[..., vocabulary]`` logits to the fp64 distributions that are sampled from."""
        scores = (logits.double() - logits.amax(-1, keepdim=True)) / self.temperature
        if self.top_k:
            limit = scores.topk(min(self.top_k, scores.shape[-1])).values[..., -1:]
            scores = scores.masked_fill(scores < limit, -torch.inf)
        p = torch.softmax(scores, dim=-1)
        if self.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            outside = ordered.cumsum(-1) - ordered >= self.top_p  # the token that crosses top_p stays in
            p = p.scatter(-1, index, ordered.masked_fill(outside, 0.0))
            p = p / p.sum(-1, keepdim=True)
        return p

    def choose(self, logits: Tensor, position: int) -> int:
        """The target's token at ``position`` of the answer, from its logits ``[vocabulary]``."""
        return choose_rows([self], logits[None], [position])[0]


def choose_rows(samplers: Sequence[Sampler], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """``Sampler.choose`` for several answers at once: a sampler, logits and a position for each row.

    Args:
        logits: ``[rows, vocabulary]``.
    """
    chosen = [0] * len(samplers)
    alike: dict[tuple[float, int, float], list[int]] = {}
    for row, one in enumerate(samplers):
        alike.setdefault((one.temperature, one.top_k, one.top_p), []).append(row)
    for (temperature, _, _), rows in alike.items():
        own = logits if len(alike) == 1 else logits[rows]
        if not temperature:
            tokens = own.max(-1).indices  # argmax takes far longer in bf16
        else:
            cumulative = samplers[rows[0]].probabilities(own).cumsum(-1)
            drawn = cumulative.new_tensor([[samplers[row]._uniform[positions[row]]] for row in rows])
            found = torch.searchsorted(cumulative, drawn * cumulative[:, -1:], right=True)
            tokens = found[:, 0].clamp(max=logits.shape[-1] - 1)
        for row, token in zip(rows, tokens.tolist(), strict=True):
            chosen[row] = token
    return chosen
