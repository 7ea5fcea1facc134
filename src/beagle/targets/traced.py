"""The target's pass as a graph: where fresh keys go, what each token sees and the cache itself are its inputs."""

from __future__ import annotations

from torch import Tensor, nn

from beagle.targets.attention import ExactPass, Pass, current_pass
from beagle.targets.ragged import RaggedPass

Masks = dict[int | None, Tensor]


class PassGraph(nn.Module):
    """What is compiled or captured: a pass over the tree of one row, or in a subclass of another kind."""

    def __init__(self, base: nn.Module, windows: list[int | None]) -> None:
        super().__init__()
        self.base = base
        self.windows = windows

    def plan(self, slots: Tensor, masks: Masks, caches: list[Tensor], own: list[Tensor]) -> Pass:
        """The pass that layers find under way; arguments as of ``forward``, ``masks`` by window."""
        return _TracedPass(slots, masks, caches)

    def forward(
        self,
        embeddings: Tensor,
        positions: Tensor,
        slots: Tensor,
        masks: list[Tensor],
        caches: list[Tensor],
        own: list[Tensor],
    ) -> Tensor:
        """
        Args:
            embeddings: ``[1, tokens, hidden]``. positions: ``[1, tokens]``, of RoPE. slots: ``[tokens]``, where fresh
                keys and values go. masks: for each window, additive ``[rows, 1, nodes, keys]`` (exact mode: fp32,
                ``[tokens, 1, keys and own keys]``). caches: keys and values of each layer in turn,
                ``[rows, kv_heads, capacity, head_dim]``, written in place. own: what a kind of pass needs besides.
        Returns:
            True states ``[1, tokens, hidden]``.
        """
        plan = self.plan(slots, dict(zip(self.windows, masks, strict=True)), caches, own)
        token = current_pass.set(plan)
        try:
            states: Tensor = self.base(inputs_embeds=embeddings, position_ids=positions, use_cache=False)[0]
            return states
        finally:
            current_pass.reset(token)


class ExactGraph(PassGraph):
    """A pass of exact mode; its own: the slots of each row's own keys."""

    def plan(self, slots: Tensor, masks: Masks, caches: list[Tensor], own: list[Tensor]) -> Pass:
        return _TracedExactPass(slots, masks, caches, *own)


class RowsGraph(PassGraph):
    """A pass over the trees of several rows; its own: ``RaggedPass.places``."""

    def plan(self, slots: Tensor, masks: Masks, caches: list[Tensor], own: list[Tensor]) -> Pass:
        return _TracedRaggedPass(slots, masks, caches, own)


class _TracedPass(Pass):
    def __init__(self, slots: Tensor, masks: Masks, caches: list[Tensor]) -> None:
        self._slots = slots
        self._caches = caches
        self._masks = masks
        self._folded_masks = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = _written(self._caches, self._slots, layer, key, value)
        end = _keys_of(self._masks)
        return keys[:, :, :end], values[:, :, :end]


class _TracedExactPass(ExactPass):
    def __init__(self, slots: Tensor, masks: Masks, caches: list[Tensor], tail_slots: Tensor) -> None:
        self._slots = slots
        self._caches = caches
        self._masks = masks
        self.tail_slots = tail_slots
        self._keys = _keys_of(masks) - tail_slots.shape[1]

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        return _written(self._caches, self._slots, layer, key, value)


class _TracedRaggedPass(RaggedPass):
    def __init__(self, slots: Tensor, masks: Masks, caches: list[Tensor], places: list[Tensor]) -> None:
        self._slots = slots
        self.places = places
        self._full = False  # a graph is for any rows
        self._caches = caches
        self._masks = masks
        self._folded_masks = {}

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        keys, values = self._caches[2 * layer : 2 * layer + 2]
        rows, padding, _ = self.places
        keys[rows, :, self._slots] = key[0].transpose(0, 1)
        values[rows, :, self._slots] = value[0].transpose(0, 1)
        live, end = padding.shape[0], _keys_of(self._masks)
        return keys[:live, :, :end], values[:live, :, :end]


def _keys_of(masks: Masks) -> int:
    return next(iter(masks.values())).shape[-1]


def _written(caches: list[Tensor], slots: Tensor, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
    """Store ``[1, kv_heads, rows, head_dim]``; all keys and values that there are."""
    keys, values = caches[2 * layer : 2 * layer + 2]
    keys[:, :, slots] = key
    values[:, :, slots] = value
    return keys, values
