"""What each token of a pass has before it, in the order of the text."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class Paths:
    """Tokens of a pass whose paths are equally long; or a prompt's, each of which has those before it.

    Attributes:
        tokens: their numbers in the pass, ``[count]``.
        columns: of the masks, where the tokens of each path stand, ``[count, length]``; of a prompt ``[1, count]``.
        is_prompt: whether they are a prompt's.
    """

    tokens: Tensor
    columns: Tensor
    is_prompt: bool = False


def paths_of(visible: Tensor, sequences: list[int], apart: bool) -> list[Paths]:
    """All tokens of a pass, those with shorter paths first.

    Args:
        visible: which columns each token sees, itself the last; bool ``[tokens, columns]``.
        sequences: each token's sequence, in their order. What stands at the beginning of one is a prompt.
        apart: each token comes alone, and there are no prompts.
    """
    lengths = visible.sum(1).tolist()
    prompts = set() if apart else {own for own, length in zip(sequences, lengths, strict=True) if length == 1}
    groups: dict[tuple[int, int], list[int]] = defaultdict(list)
    for i, (own, length) in enumerate(zip(sequences, lengths, strict=True)):
        groups[(0, own) if own in prompts else (length, i if apart else -1)].append(i)
    found = []
    for (length, _), numbers in sorted(groups.items()):
        rows = visible[numbers[-1:] if length == 0 else numbers]
        columns = rows.nonzero()[:, 1].view(len(rows), -1)
        found.append(Paths(torch.tensor(numbers, device=visible.device), columns, is_prompt=length == 0))
    return found
