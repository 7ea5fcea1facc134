"""Models whose modules compute their attention themselves, not through transformers' attention interface.

Such a model runs with its own arithmetic on a pass's tokens alone. What stands in place of its cache takes the keys and
values of each layer, and gives ``Traced`` ones back, so that the attention that the module asks for is computed by ours.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.targets.attention import attend_plan, write
from beagle.targets.cache import LayerShape
from beagle.targets.plan import Biased, Plan, Window
from beagle.targets.traced import Attention, NotAttention, Traced

OWN = "beagle_own_attention"  # attribute of a model without its LM head: windows of its layers, if they compute themselves
HIDES = -1e4  # a score's addend from here on hides its key
PROBED = 640  # tokens whose masks and biases are read


class _FreshText:
    """A cache of transformers' before the first token, as far as models ask it."""

    is_compileable = False

    def inputs(self, name: str) -> dict[str, Any]:
        """What a model is given besides."""
        return {name: self}

    def get_seq_length(self, layer_idx: int | None = 0) -> int:
        return 0

    def get_query_offset(self, layer_idx: int | None = 0) -> int:
        return 0

    def get_mask_sizes(self, q_length: int, layer_idx: int | None = 0) -> tuple[int, int]:
        return q_length, 0


class OwnCache(_FreshText):
    """Takes the place of transformers' KV cache in a pass."""

    def __init__(self, plan: Plan, windows: list[Window]) -> None:
        """
        Args:
            plan: of the pass.
            windows: of the layers, by their numbers.
        """
        self._plan, self._windows = plan, windows

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Traced, Traced]:
        """Writes fresh keys and values ``[batch, kv_heads, tokens, head_dim]``; returns what stands for all in view."""
        plan, window = self._plan, self._windows[layer_idx]
        keys, values = write(plan, layer_idx, key, value)

        def finish(of: Attention) -> Tensor:
            return attend_plan(plan, query_of(of, key).to(keys.dtype), keys, values, of.scale, window, None, None)

        return traced(key, value, finish)


def traced(key: Tensor, value: Tensor, finish: Callable[[Attention], Tensor]) -> tuple[Traced, Traced]:
    """What a module computes its attention with, in place of its keys and values."""
    keys, values = Attention("keys", finish), Attention("values", finish)
    return Traced.like(key, keys, key.device), Traced.like(value, values, value.device)


def query_of(of: Attention, key: Tensor) -> Tensor:
    """The query, ``[batch, heads, tokens, head_dim]``, of a module that may have put batch and heads into one.

    Args:
        of: the module's attention.
        key: its fresh keys ``[batch, kv_heads, tokens, head_dim]``.
    """
    batch, _, tokens, dim = key.shape
    assert of.query is not None
    return of.query.reshape(batch, -1, tokens, dim)


class Learning(_FreshText):
    """Takes notes of each layer's attention; what it computes has the right shape and means nothing.

    Attributes:
        calls: how often each layer asked.
        shapes: what each layer caches.
        heads: query heads of each.
        windows: what each sees.
    """

    def __init__(self) -> None:
        self.calls: dict[int, int] = {}
        self.shapes: dict[int, LayerShape] = {}
        self.heads: dict[int, int] = {}
        self.windows: dict[int, Window] = {}

    def update(self, key: Tensor, value: Tensor, layer_idx: int, *args: Any, **kwargs: Any) -> tuple[Traced, Traced]:
        def finish(of: Attention) -> Tensor:
            query = query_of(of, key)
            self.heads[layer_idx] = query.shape[1]
            self.windows[layer_idx] = seen_by(of, key.shape[2])
            query = query.to(key.dtype)
            return F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=True)

        self.calls[layer_idx] = self.calls.get(layer_idx, 0) + 1
        self.shapes[layer_idx] = LayerShape(key.shape[1], key.shape[3], value.shape[3])
        return traced(key, value, finish)


def seen_by(of: Attention, n: int) -> Window:
    """What a layer sees of a text of ``n`` tokens.

    Raises:
        NotAttention: its masks or its biases are of no sort that a plan has.
    """
    ones = torch.ones(n, n, dtype=torch.bool, device=of.query.device if of.query is not None else None)
    visible = ones.tril() if of.causal else ones
    bias = torch.zeros(1, 1, 1, device=ones.device)
    for mask in of.hidden:
        visible = visible & ~_headless(mask.expand(*mask.shape[:-2], n, n))
    for tensor, factor in of.added:
        if not factor:
            continue
        added = tensor.float() * factor
        hides = added < HIDES
        if hides.any():
            visible = visible & ~_headless(hides.expand(*hides.shape[:-2], n, n))
        bias = bias + added.masked_fill(hides, 0.0).reshape(-1, *added.shape[-2:])
    at = torch.arange(n, device=ones.device)
    age = at[:, None] - at
    found = int(visible[-1].sum())
    if not torch.equal(visible, (age >= 0) & (age < found)):
        raise NotAttention("its mask is neither causal nor a sliding window")
    window = None if found == n else found
    slopes = _slopes(bias.expand(-1, n, n), visible, of.scale)
    if slopes is not None and window is not None:
        raise NotAttention("it adds a bias in a sliding window")
    return slopes or window


def _headless(mask: Tensor) -> Tensor:
    """A mask ``[..., queries, keys]`` that is the same for all heads, without them."""
    flat = mask.reshape(-1, *mask.shape[-2:])
    if not torch.equal(flat, flat[:1].expand_as(flat)):
        raise NotAttention("each head has a mask of its own")
    return flat[0]


def _rounded_slopes(biases: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """Slopes ``[heads]`` of linear biases that were rounded: as slopes that are round themselves, and as others.

    Args:
        biases: by the key's position, ``[heads, keys]``.
        eps: of the dtype that they were rounded to.
    """
    behind = biases[:, 1:] / torch.arange(1, biases.shape[-1], device=biases.device)
    least = (behind - behind.abs() * eps / 2).amax(1)
    return biases[:, 1], (least + (behind + behind.abs() * eps / 2).amin(1)) / 2


def _slopes(bias: Tensor, visible: Tensor, scale: float) -> Biased | None:
    """The linear biases of each head ``[heads, queries, keys]``; None: there are none.

    Args:
        bias: of each query and key.
        visible: ``[queries, keys]``.
        scale: of the scores, with which a model may multiply its biases, too.

    Raises:
        NotAttention: they are not linear in the key's position.
    """
    last = bias[:, -1]  # [heads, keys]; the same for each query, but for a number of its own
    most = max(float(bias.abs().max()), 1e-6)
    apart = (bias - last[:, None]) - (bias - last[:, None])[..., :1]
    if float((apart * visible).abs().max()) > 1e-5 * most:
        raise NotAttention("it adds a bias that is not linear in the position")
    at = torch.arange(last.shape[-1], device=last.device)
    rise = last - last[:, :1]
    if float(rise.abs().max()) < 1e-6:
        return None
    slopes = rise[:, -1:] / at[-1]
    if float((rise - slopes * at).abs().max()) <= 1e-5 * most:
        return Biased(tuple(slopes[:, 0].tolist()))
    for factor, name in itertools.product((1.0, scale), ("bfloat16", "float16")):
        for slopes in _rounded_slopes(last / factor, torch.finfo(getattr(torch, name)).eps):
            found = Biased(tuple(slopes.tolist()), name, factor)
            if float((found.at(at, 3) - last).abs().max()) <= 1e-6 * most:
                return found
    raise NotAttention("it adds a bias that is not linear in the position")
