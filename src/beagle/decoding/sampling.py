"""How the next token is chosen, the same way with and without drafts."""

from __future__ import annotations

import math
import operator
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    MinNewTokensLengthLogitsProcessor,
    RepetitionPenaltyLogitsProcessor,
    SequenceBiasLogitsProcessor,
)

from beagle.decoding.noise import Noise
from beagle.drafters.base import LevelNoise
from beagle.errors import BeagleError

MOST_NOISE = 1000.0  # temperature beyond which a draft has nothing to gain, and fp32 an infinity to fear


class BatchOptions(TypedDict, total=False):
    """What the prompts of a batch share, each as of ``SamplingParams``."""

    max_new_tokens: int
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    stop: str | Sequence[str]
    stop_token_ids: Sequence[int]
    ignore_eos: bool
    min_new_tokens: int
    repetition_penalty: float
    presence_penalty: float
    frequency_penalty: float
    logit_bias: Mapping[int, float]


class SamplingOptions(BatchOptions, total=False):
    """``SamplingParams`` as keyword arguments."""

    seed: int


@dataclass(frozen=True)
class SamplingParams:
    """How an answer is chosen and where it ends.

    The logits of each token are processed in this order: logit bias, repetition penalty, presence and
    frequency penalties, minimum length; then temperature, top-k, top-p and min-p.

    Attributes:
        max_new_tokens: most tokens of the answer, EOS included; never overshot.
        temperature: 0 chooses the likeliest token (greedy).
        top_k: sample among the k likeliest tokens; 0 is off.
        top_p: sample among the likeliest tokens that together have this probability; 1 is off.
        min_p: leave out tokens with less than this share of the likeliest one's probability; 0 is off.
        seed: of the random numbers, from ``-2**63`` to ``2**64 - 1``.
        stop: a text or several; the answer ends before the first of them. Special tokens' texts count.
        stop_token_ids: tokens that end the answer as EOS does: the token is in ``token_ids``, not in the text.
        ignore_eos: EOS does not end the answer.
        min_new_tokens: EOS and ``stop_token_ids`` can't be chosen before the answer has so many tokens.
        repetition_penalty: tokens of prompt and answer have their logit divided by this where it is positive,
            else multiplied; 1 is off.
        presence_penalty: subtracted from the logits of the answer's tokens so far, from -2 to 2.
        frequency_penalty: the same, once for each time that the token is in the answer.
        logit_bias: added to the logits of these token ids.

    Raises:
        BeagleError: a value has the wrong type or is out of range; it is named.
    """

    max_new_tokens: int = 256
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    seed: int = 0
    stop: str | Sequence[str] = ()
    stop_token_ids: Sequence[int] = ()
    ignore_eos: bool = False
    min_new_tokens: int = 0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] = field(default_factory=dict, hash=False)

    def __post_init__(self) -> None:
        checked: dict[str, Any] = {
            "max_new_tokens": whole("max_new_tokens", self.max_new_tokens, 1),
            "temperature": number("temperature", self.temperature, 0),
            "top_k": whole("top_k", self.top_k, 0),
            "top_p": number("top_p", self.top_p, 0, 1, above=True),
            "min_p": number("min_p", self.min_p, 0, 1),
            "seed": whole("seed", self.seed, -(2**63), 2**64 - 1),
            "stop": texts("stop", self.stop),
            "stop_token_ids": token_ids("stop_token_ids", self.stop_token_ids),
            "min_new_tokens": whole("min_new_tokens", self.min_new_tokens, 0),
            "repetition_penalty": number("repetition_penalty", self.repetition_penalty, 0, above=True),
            "presence_penalty": number("presence_penalty", self.presence_penalty, -2, 2),
            "frequency_penalty": number("frequency_penalty", self.frequency_penalty, -2, 2),
        }
        if not isinstance(self.ignore_eos, bool):
            raise BeagleError(f"ignore_eos is {self.ignore_eos!r}; use True or False")
        if not isinstance(self.logit_bias, Mapping):
            raise BeagleError(f"logit_bias is a {type(self.logit_bias).__name__}; give a dict of token ids and numbers")
        checked["logit_bias"] = {
            whole("a token of logit_bias", token, 0): number(f"logit_bias of token {token!r}", bias, -math.inf)
            for token, bias in self.logit_bias.items()
        }
        if checked["min_new_tokens"] > checked["max_new_tokens"]:
            raise BeagleError(
                f"min_new_tokens is {self.min_new_tokens}, max_new_tokens {self.max_new_tokens}; ask for fewer at least"
            )
        for name, value in checked.items():
            object.__setattr__(self, name, value)

    def check_vocabulary(self, size: int) -> None:
        """Refuse token ids that a target does not have.

        Args:
            size: tokens of the target's vocabulary.

        Raises:
            BeagleError: a token id is none of them.
        """
        for name, tokens in (("stop_token_ids", self.stop_token_ids), ("logit_bias", self.logit_bias)):
            for token in tokens:
                if token >= size:
                    raise BeagleError(f"{name} names token {token}; the vocabulary has ids from 0 to {size - 1}")


def whole(name: str, value: Any, least: int, most: int | None = None) -> int:
    """``value`` as an int, if it is a whole number (no bool) in range."""
    try:
        found = None if isinstance(value, bool) else operator.index(value)
    except TypeError:
        found = None
    if found is None or found < least or (most is not None and found > most):
        limits = f"from {least} on" if most is None else f"from {least} to {most}"
        raise BeagleError(f"{name} is {value!r}; use a whole number {limits}")
    return found


def number(name: str, value: Any, least: float, most: float = math.inf, *, above: bool = False) -> float:
    """``value`` as a finite float, if it is in range (``above``: not ``least`` itself)."""
    try:
        found = math.nan if isinstance(value, bool | str) else float(value)
    except (TypeError, ValueError, OverflowError):
        found = math.nan
    if not math.isfinite(found) or not least <= found <= most or (above and found == least):
        limits = [f"{'above' if above else 'from'} {least}"] if math.isfinite(least) else []
        limits += [f"up to {most}"] if math.isfinite(most) else []
        raise BeagleError(f"{name} is {value!r}; use a {' '.join(['finite number', *limits])}")
    return found


def texts(name: str, value: Any) -> tuple[str, ...]:
    """A text or several, none of them empty."""
    several = isinstance(value, Sequence) and all(isinstance(text, str) for text in value)
    if not several:
        raise BeagleError(f"{name} is {value!r}; use a text or a list of texts")
    found = (value,) if isinstance(value, str) else tuple(value)
    if not all(found):
        raise BeagleError("stop: a stop string is empty; leave it out")
    return found


def token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, str) or not hasattr(value, "__iter__"):
        raise BeagleError(f"{name} is {value!r}; use a list of token ids")
    return tuple(whole(f"a token of {name}", token, 0) for token in value)


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
            name: of the target, for errors.
        """
        self.sampling = sampling or SamplingParams()
        self.name = name
        self._ends = frozenset(self.sampling.stop_token_ids).union(() if self.sampling.ignore_eos else eos_ids)
        self._processors = processors(self.sampling, len(prompt), self._ends)
        self._context = torch.tensor([list(prompt)], dtype=torch.int64) if self._processors else None
        self.greedy = not self.sampling.temperature and not self._processors
        self._noise = Noise(self.sampling.seed)

    def noise(self, position: int) -> LevelNoise | None:
        """What a draft adds to its logits, whose first level takes ``position`` of the answer; None if nothing is drawn."""
        if not self.sampling.temperature:
            return None
        scale = min(self.sampling.temperature, MOST_NOISE)

        def scaled(level: int, size: int, device: torch.device) -> Tensor:
            return self._noise.at(position + level - 1, size, device) * scale

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

    @property
    def truncates(self) -> bool:
        """Whether some tokens can't be chosen, however they are drawn."""
        return bool(self.sampling.top_k) or self.sampling.top_p < 1 or self.sampling.min_p > 0

    def drawn(self, position: int, size: int, device: torch.device) -> Tensor:
        """Noise of each token at ``position``, ``[size]``; earlier positions are not asked for again."""
        self._noise.forget(position)
        return self._noise.at(position, size, device)

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
        samplers: one for each answer.
        logits: ``[answers, vocabulary]``.
        positions: of each answer, which the chosen token takes.
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
    for (temperature, *_), group in alike.items():
        own = logits if len(alike) == 1 else logits[group]
        if not temperature:
            largest, tokens = own.max(-1)  # argmax takes far longer in bf16
        else:
            largest = own.amax(-1)
            scores = (own.double() - largest[:, None]) / temperature
            if samplers[group[0]].truncates:
                scores = scores.masked_fill(samplers[group[0]].probabilities(own) == 0, -torch.inf)
            for score, i in zip(scores, group, strict=True):
                score += samplers[i].drawn(positions[i], len(score), score.device)
            tokens = scores.argmax(-1)
        for i, token, value in zip(group, tokens.tolist(), largest.tolist(), strict=True):
            samplers[i].check(value)
            chosen[i] = token
    return chosen
