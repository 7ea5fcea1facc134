"""What recurrent layers keep of each sequence, so that rejected tokens leave no trace.

A recurrent state can't be cut back to an earlier token. So each layer keeps the state that it had at some token, and what it
was given since. The next pass says where its tokens begin: what the layer was given up to there is run again, in front of
the new tokens, and what lies behind is forgotten. Only recurrent layers run tokens again; all others see new ones alone.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from torch import Tensor

State = dict[tuple[str, int], Tensor]  # a layer's states of one sequence, by their sort and number, ``[1, ...]`` each


@dataclass
class Track:
    """What one recurrent layer keeps of one sequence.

    Attributes:
        states: by the number of tokens that they have seen. Of no tokens there is none.
        first: the least of these numbers.
        inputs: what the layer was given since, ``[tokens, hidden]``; None: nothing.
    """

    states: dict[int, State] = field(default_factory=lambda: {0: {}})
    first: int = 0
    inputs: Tensor | None = None

    def cut(self, start: int, committed: int) -> int:
        """Forget what lies behind the first ``start`` tokens, and what is older than any state that is still needed.

        Returns:
            How many tokens the latest state has seen; ``since`` gives the inputs from there on.
        Raises:
            RuntimeError: those tokens haven't run, or their state is no longer kept.
        """
        if start == 0:
            self.restart(0, {})
        count = len(self.inputs) if self.inputs is not None else 0
        oldest = max((n for n in self.states if n <= committed), default=None)
        if oldest is None or self.first + count < start:
            raise RuntimeError(f"a recurrent layer has no state of {start} tokens")
        if self.inputs is not None:
            self.inputs = self.inputs[oldest - self.first : start - self.first]
        self.states = {n: state for n, state in self.states.items() if oldest <= n <= start}
        self.first = oldest
        return max(self.states)

    def append(self, inputs: Tensor) -> None:
        """The layer is given more, ``[tokens, hidden]``."""
        self.inputs = inputs if self.inputs is None else torch.cat([self.inputs, inputs])

    def since(self, seen: int) -> Tensor:
        """What the layer was given behind the first ``seen`` tokens, ``[tokens, hidden]``."""
        assert self.inputs is not None
        return self.inputs[seen - self.first :]

    def restart(self, seen: int, state: State) -> None:
        """Keep a state of ``seen`` tokens alone."""
        self.states, self.first, self.inputs = {seen: state}, seen, None

    def take(self, other: Track) -> None:
        """Become a copy of ``other``; tensors are shared, since nothing writes into them."""
        self.states, self.first, self.inputs = dict(other.states), other.first, other.inputs


@dataclass(frozen=True)
class Chains:
    """What a pass does to recurrent layers: a chain of tokens goes on behind each of some sequences.

    Attributes:
        tracks: of each sequence, one for each recurrent layer.
        committed: tokens of each sequence that no later pass rejects.
        starts: tokens of each sequence before those of the pass.
        counts: tokens of the pass, of each sequence.
    """

    tracks: list[list[Track]]
    committed: list[int]
    starts: list[int]
    counts: list[int]
