"""Gumbel noise, and the token that it draws from logits, by the CPU kernel (``choice.h``)."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from beagle.targets.linears import tiled


def gumbel(keys: Sequence[int], tokens: Tensor) -> Tensor | None:
    """What ``decoding.noise.gumbel`` makes; None where the kernel doesn't."""
    kernel = tiled.kernel()
    if kernel is None or not tokens.is_cpu:
        return None
    tokens, own, out = tokens.contiguous(), torch.tensor(keys), torch.empty(len(keys), len(tokens))
    kernel.gumbel(own.data_ptr(), tokens.data_ptr(), out.data_ptr(), *out.shape)
    return out


def draw(logits: Tensor, keys: Sequence[int], temperature: float) -> tuple[Tensor, Tensor] | None:
    """What ``decoding.noise.draw`` finds where every token may be drawn; None where the kernel doesn't."""
    if tiled.used(logits.dtype) is None or not logits.is_cpu:
        return None
    logits, own = logits.contiguous(), torch.tensor(keys)
    largest, tokens = torch.empty(len(keys)), torch.empty(len(keys), dtype=torch.int64)
    pointers = (tensor.data_ptr() for tensor in (logits, own, largest, tokens))
    tiled.kernel().draw(*pointers, *logits.shape, temperature)
    return largest, tokens
