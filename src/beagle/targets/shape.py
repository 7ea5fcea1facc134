"""Who descends from whom in a tree of tokens."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class TreeShape:
    """Who descends from whom among the nodes of one verification, node 0 being the root.

    Attributes:
        parents: parent of each node, ``parents[0] == -1``; parents stand before their children.
    """

    parents: list[int]

    def __post_init__(self) -> None:
        if any(not -1 <= parent < node for node, parent in enumerate(self.parents)):
            raise ValueError("parents of a tree stand before their children")

    @classmethod
    def chain(cls, nodes: int) -> TreeShape:
        """Each node the parent of the next."""
        return cls(list(range(-1, nodes - 1)))

    @property
    def is_chain(self) -> bool:
        """Whether no node has two children."""
        return self.parents == list(range(-1, len(self.parents) - 1))

    def depths(self) -> list[int]:
        """Depth of each node; the root's is 0."""
        depths = [0]
        for parent in self.parents[1:]:
            depths.append(depths[parent] + 1)
        return depths

    def ancestors(self) -> Tensor:
        """Bool ``[nodes, nodes]``: ``[i, j]`` is true if j is i or an ancestor of i."""
        n = len(self.parents)
        rows: list[bytearray] = []
        for node, parent in enumerate(self.parents):
            row = bytearray(n) if parent < 0 else bytearray(rows[parent])
            row[node] = True
            rows.append(row)
        return torch.frombuffer(bytearray().join(rows), dtype=torch.bool).view(
            n, n
        )  # a tensor operation a node takes long
