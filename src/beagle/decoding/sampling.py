"""How the next token is chosen, the same way with and without drafts."""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from beagle.decoding.noise import draw, gumbel, noise_key
from beagle.decoding.sampling_params import SamplingParams
from beagle.drafters.base import LevelNoise
from beagle.errors import BeagleError
from beagle.targets.linears import tiled

MOST_NOISE = 1000.0  # temperature beyond which a draft has nothing to gain, and fp32 an infinity to fear


class PresenceFrequencyPenalty(LogitsProcessor):
    """OpenAI's penalties on tokens that the answer has already."""

    def __init__(self, presence: float, frequency: float, prompt_length: int) -> None:
        self._presence, self._frequency, self._prompt_length = presence, frequency, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        """
        Args:
            input_ids: ``[1, n]`` prompt and answer.
            scores: ``[1, vocabulary]``.
        """
        counts = torch.bincount(input_ids[0, self._prompt_length :], minlength=scores.shape[-1])
        return scores - self._frequency * counts - self._presence * (counts > 0)


def processors(sampling: SamplingParams, prompt_length: int, ends: Collection[int]) -> list[LogitsProcessor]:
    """What changes the logits before temperature, top-k, top-p and min-p do, in transformers' order."""
    made: list[LogitsProcessor] = []
    if sampling.logit_bias:
        bias: Any = {(token,): bias for token, bias in sampling.logit_bias.items()}
        made.append(SequenceBiasLogitsProcessor(bias))
    if sampling.repetition_penalty != 1:
        made.append(RepetitionPenaltyLogitsProcessor(sampling.repetition_penalty))
    if sampling.presence_penalty or sampling.frequency_penalty:
        made.append(PresenceFrequencyPenalty(sampling.presence_penalty, sampling.frequency_penalty, prompt_length))
    if sampling.min_new_tokens and ends:
        made.append(MinNewTokensLengthLogitsProcessor(prompt_length, sampling.min_new_tokens, sorted(ends)))
    return made


class Sampler:
    """Chooses the target's token at a position of the answer, and knows where the answer ends.

    Each position of the answer owns Gumbel noise for each token that follows from the seed; the largest
    of log-probability plus noise is the token. A tree node at depth d is judged with the noise of the
    position it would take, and with logits processed after the tokens before it, so drafts cannot change
    the answer: the same seed gives the same text with and without them, and each token follows the
    target's own distribution. A drafter that adds the same noise to its own logits proposes the tokens
    that are likely to win (Daliri et al. 2024, arXiv 2408.07978).

    Positions are asked for in order, and ``ended`` takes each chosen token before the next is chosen.

    Attributes:
        greedy: the token is that of the largest logit, as it is.
    """

    def __init__(
        self,
        sampling: SamplingParams | None = None,
        *,
        prompt: Sequence[int] = (),
        eos_ids: Collection[int] = (),
        name: str = "the target",
    ) -> None:
        """
        Args:
            sampling: its length and stop strings are for others to watch.
            prompt: token ids; the repetition penalty counts them.
            eos_ids: tokens that end an answer, unless ``sampling`` ignores them.
        """
        self.sampling = sampling or SamplingParams()
        self.name = name
        self._ends = frozenset(self.sampling.stop_token_ids).union(() if self.sampling.ignore_eos else eos_ids)
        self._processors = processors(self.sampling, len(prompt), self._ends)
        self._context = torch.tensor([list(prompt)], dtype=torch.int64) if self._processors else None
        self.greedy = not self.sampling.temperature and not self._processors

    def noise(self, position: int) -> LevelNoise | None:
        """What a draft adds to its logits, whose first level takes ``position`` of the answer; None if nothing is drawn."""
        if not self.sampling.temperature:
            return None
        scale = min(self.sampling.temperature, MOST_NOISE)

        def scaled(levels: Sequence[int], tokens: Tensor) -> Tensor:
            return gumbel([self.key(position + level - 1) for level in levels], tokens).mul_(scale)

        return scaled

    def process(self, logits: Tensor) -> Tensor:
        """``[vocabulary]`` logits of the next token, as penalties, bias and the minimum length leave them."""
        if self._context is None:
            return logits
        self._context = self._context.to(logits.device)
        scores = logits[None].float()
        for processor in self._processors:
            scores = processor(self._context, scores)
        return scores[0]

    def probabilities(self, logits: Tensor) -> Tensor:
        """``[..., vocabulary]`` processed logits to the fp64 distributions that are sampled from."""
        sampling = self.sampling
        scores = (logits.double() - logits.amax(-1, keepdim=True)) / sampling.temperature
        if sampling.top_k:
            limit = scores.topk(min(sampling.top_k, scores.shape[-1])).values[..., -1:]
            scores = scores.masked_fill(scores < limit, -torch.inf)
        p = torch.softmax(scores, dim=-1)
        if sampling.top_p < 1:
            ordered, index = p.sort(dim=-1, descending=True, stable=True)
            outside = ordered.cumsum(-1) - ordered >= sampling.top_p  # the token that crosses top_p stays in
            p = p.scatter(-1, index, ordered.masked_fill(outside, 0.0))
            p = p / p.sum(-1, keepdim=True)
        if sampling.min_p:
            p = p.masked_fill(p < sampling.min_p * p.amax(-1, keepdim=True), 0.0)
            p = p / p.sum(-1, keepdim=True)
        return p

    def choose(self, logits: Tensor, position: int) -> int:
        """The target's token at ``position`` of the answer, from its logits ``[vocabulary]``.

        Raises:
            BeagleError: see ``check``.
        """
        return choose_all([self], logits[None], [position])[0]

    def key(self, position: int) -> int:
        """Of the noise at ``position``, see ``noise.gumbel``."""
        return noise_key(self.sampling.seed, position)

    def check(self, largest: float) -> None:
        """
        Args:
            largest: of a token's logits; NaN where one of them is.
        Raises:
            BeagleError: it is NaN or infinite, so that no token is the likeliest.
        """
        if not math.isfinite(largest):
            raise BeagleError(
                f"{self.name}: its logits are {largest}, so no token can be chosen; load it with dtype float32, "
                "or check its weights"
            )

    def ended(self, token: int) -> bool:
        """Take the chosen token; whether the answer ends with it."""
        if self._context is not None:
            self._context = torch.cat([self._context, self._context.new_tensor([[token]])], dim=1)
        return token in self._ends


def choose_all(samplers: Sequence[Sampler], logits: Tensor, positions: Sequence[int]) -> list[int]:
    """``Sampler.choose`` for several answers at once: each has a sampler, logits and a position.

    Args:
        logits: ``[answers, vocabulary]``.
    Raises:
        BeagleError: see ``Sampler.check``.
    """
    if any(one._context is not None for one in samplers):
        logits = torch.stack([one.process(own.float()) for one, own in zip(samplers, logits, strict=True)])
    chosen = [0] * len(samplers)
    alike: dict[tuple[float, ...], list[int]] = {}
    for i, one in enumerate(samplers):
        by = one.sampling
        alike.setdefault((by.temperature, by.top_k, by.top_p, by.min_p) if by.temperature else (0.0,), []).append(i)
    for group in alike.values():
        own = logits if len(alike) == 1 else logits[group]
        by = samplers[group[0]].sampling
        if not by.temperature:
            largest, tokens = tiled.largest(own)
        else:
            limited = by.top_k or by.top_p < 1 or by.min_p  # some tokens can't be chosen, however they are drawn
            impossible = samplers[group[0]].probabilities(own) == 0 if limited else None
            keys = [samplers[i].key(positions[i]) for i in group]
            largest, tokens = draw(own, keys, by.temperature, impossible)
        for i, token, value in zip(group, tokens.tolist(), largest.tolist(), strict=True):
            samplers[i].check(value)
            chosen[i] = token
    return chosen
