"""Layers that choose the keys a token sees by an index: a small key of each token, kept beside its keys and values.

transformers' module hands its small keys to a cache, scores a query by those that the cache returns, and names the best by
their place among them. Ours returns those on the token's own path, in the order of the text: so the module chooses among
what it would see in plain decoding, even where scores are equal, and rejected tokens leave no trace.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from beagle.targets.attention import current_plan, write
from beagle.targets.paths import Paths, paths_of
from beagle.targets.plan import Plan
from beagle.targets.plan_cache import OPEN, PlanCache


@dataclass(frozen=True)
class _SmallKeys:
    """In the place of transformers' cache for one call of the module.

    Attributes:
        update: takes fresh small keys ``[rows, tokens, width]``, gives all in view of each row.
    """

    update: Callable[[Tensor], Tensor]

    def update_indexer(self, indexer_key_states: Tensor, layer_idx: int) -> Tensor:
        return self.update(indexer_key_states)


class _Call:
    """A module's call, to be made for some of its tokens."""

    def __init__(self, own: Callable[..., Tensor], arguments: tuple[Any, ...], options: dict[str, Any]) -> None:
        """
        Args:
            own: the module's ``forward``.
            arguments: of the call; tensors have ``[batch, tokens]`` in front.
            options: of the call, by name.
        """
        self._own, self._positional = own, len(arguments)
        self._given: dict[Any, Any] = dict(enumerate(arguments)) | options

    def __call__(self, of: Callable[[Tensor], Tensor], mask: Tensor, keys: _SmallKeys) -> Tensor:
        """Places ``[rows, tokens, chosen]`` among the keys in view.

        Args:
            of: makes ``[rows, tokens, …]`` of a tensor of the call.
            mask: bool ``[rows or 1, tokens, keys]``.
            keys: what the module is given as its cache.
        """

        def other(value: Any) -> Any:
            if isinstance(value, PlanCache):
                return keys
            if isinstance(value, tuple):
                return tuple(map(other, value))
            if not isinstance(value, Tensor):
                return value
            return mask if value.shape == OPEN[1:] else of(value)

        given = {name: other(value) for name, value in self._given.items()}
        arguments = [given.pop(i) for i in range(self._positional)]
        return self._own(*arguments, **given).long()


class IndexForward:
    """In the place of a module's ``forward``: says of every key whether it is seen, instead of the numbers of those.

    Attributes:
        own: the module's ``forward``.
    """

    def __init__(self, own: Callable[..., Tensor], layer: int) -> None:
        """
        Args:
            own: as the attribute.
            layer: under which its small keys are cached.
        """
        self.own, self._layer = own, layer

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        """Bool, in the shape of the plan's masks; of prompts ``[batch, 1, queries, keys]``."""
        plan = current_plan.get(None)
        if plan is None:
            return self.own(*arguments, **options)
        call = _Call(self.own, arguments, options)
        return self._of_prompt(plan, call) if plan.kind == "prompt" else self._of_paths(plan, call)

    def _of_prompt(self, plan: Plan, call: _Call) -> Tensor:
        def update(fresh: Tensor) -> Tensor:
            small = fresh[:, None]
            return write(plan, self._layer, small, small[..., :0])[0][:, 0]

        visible = plan.masks[None] == 0
        chosen = call(lambda value: value, visible[:, 0], _SmallKeys(update))
        seen = torch.zeros(len(chosen), *visible.shape[1:], dtype=torch.bool, device=visible.device)
        return seen.scatter_(-1, chosen[:, None], True) & visible

    def _of_paths(self, plan: Plan, call: _Call) -> Tensor:
        visible = plan.masks[None][:, 0] == 0
        if plan.sequences is not None:
            visible = visible.flatten(0, 1)[plan.sequences.place]
        elif plan.tail is None:
            visible = visible[0]
        seen = torch.zeros_like(visible)
        if not plan.paths:
            sequences = [0] * len(visible) if plan.sequences is None else plan.sequences.sequence.tolist()
            plan.paths += paths_of(visible, sequences, apart=plan.tail is not None)
        for paths in plan.paths:
            chosen = self._of_some(plan, call, paths)
            places = paths.columns.expand(len(chosen), -1).gather(1, chosen)
            seen[paths.tokens[:, None], places] = True
        seen &= visible
        if plan.sequences is not None:
            return seen[plan.sequences.padding][:, None]
        return seen[None, None] if plan.tail is None else seen[:, None]

    def _of_some(self, plan: Plan, call: _Call, paths: Paths) -> Tensor:
        """Places ``[count, chosen]`` on the paths of some tokens."""
        tokens, slots, columns = paths.tokens, plan.slots, paths.columns
        count, length = len(tokens), columns.shape[1]
        own = tokens + slots.start if isinstance(slots, slice) else slots[tokens]
        sequence = torch.zeros_like(tokens) if plan.sequences is None else plan.sequences.sequence[tokens]
        if plan.tail is not None:
            tail = plan.tail[tokens].gather(1, (columns - plan.keys).clamp(min=0))
            columns = torch.where(columns < plan.keys, columns, tail)
        held = plan.layers[2 * self._layer][:, 0]  # [sequences, capacity, width]
        rows = (1, count) if paths.is_prompt else (count, 1)

        def update(fresh: Tensor) -> Tensor:
            held[sequence, own] = fresh.flatten(0, 1)
            return held[sequence[: len(columns), None], columns]

        mask = torch.ones(1, rows[1], length, dtype=torch.bool, device=tokens.device)
        mask = mask.tril() if paths.is_prompt else mask
        return call(lambda value: value[0, tokens].reshape(*rows, *value.shape[2:]), mask, _SmallKeys(update)).flatten(
            0, 1
        )


def wrap(module: nn.Module, layer: int) -> None:
    """Let a module that chooses keys choose those on a token's path.

    Args:
        module: asks a cache for its small keys.
        layer: under which these are cached.
    """
    own = module.forward
    module.forward = IndexForward(own.own if isinstance(own, IndexForward) else own, layer)
