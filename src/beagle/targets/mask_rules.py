"""Which keys a query sees, read off the rule that transformers would build a mask by."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from beagle.targets.plan import Chunk


def window_of(rule: Callable[..., Tensor], keys: int, device: Any = "cpu") -> int | None:
    """The sliding window of a mask's rule, read off at positions up to ``keys``.

    Args:
        rule: transformers' mask function: batch, head, query and key positions to whether the query sees the key.
    Returns:
        Tokens in view, the query's own included; None: all before it; 0: no sliding window explains the rule.
    """
    at = torch.arange(keys + 1, device=device)
    found = int(_seen(rule, keys - 1, at).sum())
    window = None if found == keys else found
    near = [window + i for i in (-2, -1, 0, 1, 2)] if window else []
    for query in {0, 1, 2, 3, keys // 3, keys // 2, keys - 2, keys - 1, *near}:
        if 0 <= query < keys:
            expected = (at <= query) & (at > query - (window or keys + 1))
            if not torch.equal(_seen(rule, query, at), expected):
                return 0
    return window


def chunk_of(rule: Callable[..., Tensor], keys: int, device: Any = "cpu") -> Chunk | None:
    """The chunks of a mask's rule, read off as in ``window_of``; None: no chunks explain it."""
    at = torch.arange(keys + 1, device=device)
    zero = torch.zeros((), dtype=torch.long, device=device)
    size = int(torch.as_tensor(rule(zero, zero, at, zero)).expand(keys + 1).sum())  # queries that see the first key
    if size < 1:
        return None
    near = [size * chunk + i for chunk in (1, 2, 3) for i in (-1, 0, 1)]
    for query in {0, 1, 2, 3, keys // 3, keys // 2, keys - 2, keys - 1, *near}:
        if 0 <= query < keys:
            expected = (at <= query) & (at // size == query // size)
            if not torch.equal(_seen(rule, query, at), expected):
                return None
    return Chunk(size)


def _seen(rule: Callable[..., Tensor], query: int, at: Tensor) -> Tensor:
    """Whether a query sees each of the positions ``at``, which count from 0 on."""
    zero = torch.zeros((), dtype=torch.long, device=at.device)
    return torch.as_tensor(rule(zero, zero, at[query], at)).expand(len(at))
