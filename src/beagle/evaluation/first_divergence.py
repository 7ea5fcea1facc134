"""Where an answer leaves plain decoding's, and how near to a tie the target was there."""

from __future__ import annotations

from typing import Any

import torch

from beagle.targets.target import Target

NEAR_TIE = 0.5  # logits: a few steps of bfloat16 at their size; kernels of other shapes round that far apart


@torch.no_grad()
def first_divergence(target: Target, context: list[int], ours: list[int], plain: list[int]) -> dict[str, Any] | None:
    """The first position at which two greedy answers to ``context`` differ, None if they don't.

    ``gap``: logit of plain's token minus that of the other, recomputed in one pass over the context
    (so in one more kernel shape: it can be slightly negative); None where one answer only ends earlier.
    """
    if ours == plain:
        return None
    at = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
    if at is None:
        return {"position": min(len(ours), len(plain)), "gap": None}
    ids = context + plain[:at]
    states = target.prefill(torch.tensor([ids], device=target.device), target.new_cache(1, len(ids)))
    logits = target.logits(states[0, -1]).float()
    return {"position": at, "gap": round(float(logits[plain[at]] - logits[ours[at]]), 4)}


def is_near_tie(difference: dict[str, Any] | None) -> bool:
    return difference is not None and difference["gap"] is not None and abs(difference["gap"]) <= NEAR_TIE
