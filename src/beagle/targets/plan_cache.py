"""What takes the place of transformers' KV cache in layers that ask one for more than keys and values."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from beagle.targets.convolution import windowed
from beagle.targets.plan import Plan

OPEN = (1, 1, 1, 1)  # shape of the mask that goes with it, which no layer reads
ASKED = "beagle_cache"  # attribute of a model without its LM head: under which name its layers ask a cache; "": never


class PlanCache:
    """Answers by the plan of a pass.

    The text's length is another one for each token, so that tokens of a tree count from their own positions. The inputs
    of short convolutions come with those before them on each token's path.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan

    def inputs(self, name: str) -> dict[str, Any]:
        """What a model is given besides: the cache by its ``name``, and a mask, lest it asks for one's length, too."""
        return {name: self, "attention_mask": torch.ones(OPEN, device=self._plan.positions.device)}

    def get_seq_length(self, layer_idx: int | None = 0) -> Tensor:
        """Tokens before those of the pass, ``[tokens]``, to be added to a token's number in the pass."""
        positions = self._plan.positions[0]
        return positions - torch.arange(len(positions), device=positions.device)

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """As they are: the attention function writes them into our own cache, under the layer that is named here."""
        self._plan.named_layer = layer_idx
        return key, value

    def get_conv_state(self, layer_idx: int, state_idx: int = 0) -> None:
        """None, so that layers ask for more than the last state."""

    def update_conv_state(
        self, conv_states: Tensor, layer_idx: int, *, conv_kernel_size: int, state_idx: int = 0
    ) -> Any:
        """Takes fresh inputs of a convolution ``[batch, channels, tokens]``, gives their windows in their place."""
        return windowed(self._plan, layer_idx, conv_states, conv_kernel_size)


def is_open(value: Any) -> bool:
    """Whether something is the mask that goes with a ``PlanCache``."""
    return isinstance(value, Tensor) and value.shape == OPEN
