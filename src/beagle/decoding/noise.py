"""Gumbel noise of every token at every position of an answer, which a sampler and its drafter compute alike."""

from __future__ import annotations

from hashlib import blake2b

import torch
from torch import Tensor

STEP, MIX, MIX_AGAIN = -7046029254386353131, -4658895280553007687, -7723592293110705685  # of SplitMix64, as int64


class Noise:
    """Independent standard Gumbel noise that depends on seed, position and token id alone.

    A token that is the largest of log-probability plus noise follows the distribution of these probabilities.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._known: dict[int, Tensor] = {}

    def at(self, position: int, size: int, device: torch.device) -> Tensor:
        """Noise of the tokens ``0`` to ``size - 1``, fp32 ``[size]``, kept for the next call."""
        found = self._known.get(position)
        if found is None or len(found) < size or found.device != device:
            key = blake2b(f"{self._seed} {position}".encode(), digest_size=8).digest()
            found = self._known[position] = gumbel(int.from_bytes(key, "little", signed=True), size, device)
        return found[:size]

    def forget(self, position: int) -> None:
        """Positions before this one are not asked for again."""
        for known in [known for known in self._known if known < position]:
            del self._known[known]


def gumbel(key: int, size: int, device: torch.device) -> Tensor:
    """Standard Gumbel noise from the SplitMix64 generator that starts at ``key``.

    Args:
        key: an int64.
        device: where they are made; they are the same on each, but for the last bits of logarithms.

    Returns:
        fp32 ``[size]``, finite.
    """
    bits = torch.arange(1, size + 1, device=device).mul_(STEP).add_(key)
    for shift, factor in ((30, MIX), (27, MIX_AGAIN)):
        bits ^= (bits >> shift) & ((1 << (64 - shift)) - 1)  # int64 shifts its sign in
        bits *= factor
    bits ^= (bits >> 31) & ((1 << 33) - 1)
    uniform = (bits & ((1 << 63) - 1)).float().mul_(2.0**-63).clamp_(2.0**-64, 1 - 2.0**-24)
    return uniform.neg_().log1p_().neg_().log_().neg_()  # exact in the winners' tail, where uniform is near 0
