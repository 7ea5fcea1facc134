"""Where a native pass spends its time: the library's own clock, and what is around its call."""

from __future__ import annotations

import time
from statistics import median

import torch
from torch import Tensor

from beagle.targets.cache import KVCache
from beagle.targets.native import NativePass
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

TOKENS = (1, 8, 12, 16)
REPEATS = 15


@torch.no_grad()
def breakdown(target: Target, context: int) -> list[dict[str, float]]:
    """Milliseconds of passes and of their parts, an entry for each of ``TOKENS``; empty where passes aren't native.

    An entry has ``rows`` (tokens of the pass), ``ms`` of the whole pass with its LM head, and its parts: ``products_ms``,
    ``attention_ms``, ``others_ms`` (norms, RoPE, activations), ``waiting_ms`` (threads for each other), ``lm_head_ms`` and
    ``python_ms`` (embeddings, masks, calling the library). Medians, so they add up nearly.
    """
    runner = None if target.compiled is None else target.compiled.runner
    if not isinstance(runner, NativePass):
        return []
    cache = target.new_cache(1, context + TOKENS[-1])
    target.prefill(torch.ones(1, context, dtype=torch.long), cache)
    out: list[dict[str, float]] = []
    for n in TOKENS:
        turns = [_turn(target, runner, cache, n) for _ in range(REPEATS + 1)][1:]  # the first warms up
        out.append({"rows": n, **{f"{part}ms": round(1000 * median(t[part] for t in turns), 4) for part in turns[0]}})
    return out


def _turn(target: Target, runner: NativePass, cache: KVCache, n: int) -> dict[str, float]:
    tokens, shape = torch.ones(n, dtype=torch.long), TreeShape([-1] + [0] * (n - 1))
    states: list[Tensor] = []
    began = time.perf_counter()
    inside = runner.seconds(lambda: states.append(target.verify(cache, tokens, shape)))
    verified = time.perf_counter()
    target.likeliest(states[0])[1]
    ended = time.perf_counter()
    around = {"": ended - began, "lm_head_": ended - verified, "python_": verified - began - sum(inside.values())}
    return around | {f"{part}_": seconds for part, seconds in inside.items()}
