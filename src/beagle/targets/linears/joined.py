"""Linear layers that read the same input, joined to one product: a small pass is made of calls, and threads meet in each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import groupby

import torch
from torch import Tensor, nn

from beagle.targets.linears.packed import is_plain


class _Joined(nn.Module):
    """The layers' weights end to end; keeps its output until the last of its parts was taken."""

    def __init__(self, layers: list[nn.Linear]) -> None:
        super().__init__()
        self._sizes = [layer.out_features for layer in layers]
        biases: list[Tensor] = [layer.bias for layer in layers if layer.bias is not None]
        self.linear = nn.Linear(layers[0].in_features, sum(self._sizes), bias=bool(biases), device="meta")
        self.linear.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]), requires_grad=False)
        if biases:
            self.linear.bias = nn.Parameter(torch.cat(biases), requires_grad=False)
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def part(self, x: Tensor, index: int) -> Tensor:
        """``[..., in]`` -> what layer ``index`` makes of it, ``[..., out]``."""
        if x is not self._input:
            self._input, self._parts = x, self.linear(x).split(self._sizes, dim=-1)
        out = self._parts[index]
        if index == len(self._sizes) - 1:  # a trace must leave nothing behind
            self._input, self._parts = None, ()
        return out


class _Part(nn.Module):
    """Stands in for one of the joined layers."""

    def __init__(self, layer: nn.Linear, joined: _Joined, index: int) -> None:
        super().__init__()
        self.in_features, self.out_features = layer.in_features, layer.out_features
        self.joined = joined
        self._index = index

    def forward(self, x: Tensor) -> Tensor:
        return self.joined.part(x, self._index)


def join_linears(module: nn.Module, run: Callable[[], object]) -> None:
    """Join plain linear layers below ``module``, in place, that get the same tensor one after the other.

    For a pass that is about to be traced: the joined layers must be called in the same order ever after.

    Args:
        run: calls ``module`` once, so that it shows which layers these are; what it raises comes through, and then
            nothing is joined.
    """
    where = {
        child: (parent, name)
        for parent in module.modules()
        for name, child in parent.named_children()
        if is_plain(child)
    }
    calls: list[tuple[nn.Linear, Tensor]] = []  # holds the inputs, so that no two have the same id
    hooks = [layer.register_forward_pre_hook(lambda layer, inputs: calls.append((layer, inputs[0]))) for layer in where]
    try:
        run()
    finally:
        for hook in hooks:
            hook.remove()
    called = [layer for layer, _ in calls]
    for _, group in groupby(calls, key=lambda call: id(call[1])):
        layers = [layer for layer, _ in group]
        alike = {(layer.weight.dtype, layer.bias is None) for layer in layers}
        if len(layers) < 2 or len(alike) > 1 or any(called.count(layer) > 1 for layer in layers):
            continue
        joined = _Joined(layers)
        for index, layer in enumerate(layers):
            parent, name = where[layer]
            setattr(parent, name, _Part(layer, joined, index))
