"""Gumbel noise of every token at every position of an answer, which a sampler and its drafter compute alike.

A token that is the largest of log-probability plus noise follows the distribution of these probabilities.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import torch
from torch import Tensor

from beagle.targets.linears import choice

STEP, MIX, MIX_AGAIN = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of SplitMix64, as int64


def noise_key(seed: int, position: int) -> int:
    """What the noise at a position of an answer follows from, an int64."""
    found = blake2b(f"{seed} {position}".encode(), digest_size=8).digest()
    return int.from_bytes(found, "little", signed=True)


def gumbel(keys: Sequence[int], tokens: Tensor) -> Tensor:
    """Independent standard Gumbel noise of tokens, from the SplitMix64 generators that start at ``keys``.

    That of a token depends on its key alone: not on the tokens and the keys beside it.

    Args:
        keys: int64 each.
        tokens: ids, int64 ``[tokens]``. The noise is made where they are; it is the same on each device, but for the
            last bits of logarithms.

    Returns:
        fp32 ``[keys, tokens]``, finite.
    """
    found = choice.gumbel(keys, tokens)
    if found is not None:
        return found
    bits = tokens.new_empty(len(keys), len(tokens))
    for row, key in zip(bits, keys, strict=True):
        torch.mul(tokens, STEP, out=row).add_(STEP).add_(key)
    for shift, factor in ((30, MIX), (27, MIX_AGAIN)):
        bits ^= (bits >> shift).bitwise_and_((1 << (64 - shift)) - 1)  # int64 shifts its sign in
        bits *= factor
    bits ^= (bits >> 31).bitwise_and_((1 << 33) - 1)
    uniform = bits.bitwise_and_((1 << 63) - 1).float().mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()  # exact in the winners' tail, where uniform is near 0


def draw(
    logits: Tensor, keys: Sequence[int], temperature: float, impossible: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """A token of each row: the first of those of which logit / temperature plus noise is the largest, in fp64.

    Args:
        logits: ``[rows, vocabulary]``.
        keys: one a row, see ``gumbel``.
        temperature: above 0.
        impossible: tokens that can't be drawn, bool ``[rows, vocabulary]``.

    Returns:
        The largest logit of each row, NaN where one of them is, and the tokens, ``[rows]`` each.
    """
    if impossible is None:
        found = choice.draw(logits, keys, temperature)
        if found is not None:
            return found
    largest = logits.amax(-1)
    scores = (logits.double() - largest[:, None]) / temperature
    if impossible is not None:
        scores.masked_fill_(impossible, -torch.inf)
    scores += gumbel(keys, torch.arange(logits.shape[1], device=logits.device))
    return largest, scores.argmax(-1)
