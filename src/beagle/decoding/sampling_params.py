"""What a caller asks of sampling, checked."""

from __future__ import annotations

import math
import operator
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypedDict

from beagle.errors import BeagleError


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
