"""What the nodes of growing trees see: the keys of their contexts, and those that drafted nodes append."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.drafters.block import Rotation

if TYPE_CHECKING:
    from beagle.drafters.tree import TreeDrafter


class Beams:
    """The trees of several contexts while they grow, level by level: what their nodes see.

    Attributes:
        level: the level under way, the root's being 1.
    """

    def __init__(self, drafter: TreeDrafter, rows: Sequence[TreeDrafter], depth: int, width: int) -> None:
        """
        Args:
            depth: most levels. width: most nodes of a level.
        """
        self.level = 1
        self._head = drafter.head
        self._rows = list(rows)
        for row in rows:
            row._reserve(row.length + 1 + depth * width)
        dtype = drafter.lm_head.dtype
        slots = [list(range(row.length - 1, row.length - 1 + depth)) for row in rows]  # one a level
        end = max(row.length for row in rows) - 1 + depth
        self._cos, self._sin = drafter.rotations(torch.tensor(slots, device=drafter.device), end)
        # additive [contexts, beam, appended]: which of the appended keys each node sees
        self._mask = torch.zeros(len(rows), 1, 0, dtype=dtype, device=drafter.device)

    def rotation(self) -> Rotation:
        """RoPE of the one slot at which all nodes of a context's level stand, ``[contexts, 1, 1, head_dim]``."""
        level = slice(self.level - 1, self.level)
        return self._cos[:, :, level], self._sin[:, :, level]

    def append(self, k: Tensor, v: Tensor) -> None:
        """Write a key and value of each node of the beams, ``[contexts, kv_heads, beam, head_dim]``, that
        only it sees among its beam."""
        for row, key, value in zip(self._rows, k, v, strict=True):
            row._write(key, value, row.keys + self._mask.shape[2])
        self._see_own(k.shape[2])

    def _see_own(self, beam: int) -> None:
        least = torch.finfo(self._mask.dtype).min
        own = torch.full((beam, beam), least, dtype=self._mask.dtype, device=self._mask.device).fill_diagonal_(0.0)
        self._mask = torch.cat([self._mask, own.expand(len(self._mask), -1, -1)], dim=2)

    @property
    def contexts(self) -> int:
        return len(self._rows)

    def places(self, appended: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """``append`` and ``attend`` of one context, left to the caller.

        Args:
            appended: nodes that write a key; 0 or all of the beam.
        Returns:
            The cache's keys and values ``[kv_heads, capacity, head_dim]``; the slots to write, ``[appended]``; the
            whole additive mask ``[beam, keys]``.
        """
        (row,) = self._rows
        known, at = row.keys, row.keys + self._mask.shape[2]
        if appended:
            self._see_own(appended)
        (mask,) = F.pad(self._mask, (known, 0))
        return row._cache[0], row._cache[1], torch.arange(at, at + appended, device=mask.device), mask

    def attend(self, q: Tensor) -> Tensor:
        """Attention of ``q [contexts, heads, beam, head_dim]`` over the contexts and what nodes see of the rest."""
        out = []
        for row, query, mask in zip(self._rows, q, self._mask, strict=True):
            keys, values = row._cache[:, None, :, : row.keys + mask.shape[1]]
            whole = None
            if mask.shape[1]:
                whole = torch.cat([mask.new_zeros(len(mask), row.keys), mask], dim=1)[None, None]
            out.append(self._head.attend(query[None], keys, values, whole))
        return torch.cat(out)

    def descend(self, parents: Tensor) -> None:
        """The next level's beams: parents ``[contexts, beam]`` among this level's nodes."""
        if self._mask.shape[2]:
            self._mask = self._mask.gather(1, parents[..., None].expand(-1, -1, self._mask.shape[2]))
        else:
            self._mask = self._mask.new_zeros(*parents.shape, 0)

    def keep(self, contexts: list[int]) -> None:
        """Only these go on."""
        self._rows = [self._rows[i] for i in contexts]
        self._cos, self._sin, self._mask = self._cos[contexts], self._sin[contexts], self._mask[contexts]
