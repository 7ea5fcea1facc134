"""From hidden states to logits."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.targets.devices import present
from beagle.targets.linears import tiled
from beagle.targets.linears.packed import is_plain, packed
from beagle.targets.linears.product import Int8Product, Near, Product
from beagle.targets.linears.quantized import VectorQuantizer, quantized


class LMHead:
    """A model's LM head with its logit scale and soft cap."""

    def __init__(self, head: nn.Module | None, config: Any, name: str, pack: bool) -> None:
        """
        Args:
            head: the model's own; None where it has none.
            pack: reorder the weight for the CPU's kernels.
        Raises:
            BeagleError: it isn't one linear layer.
        """
        if not isinstance(getattr(head, "weight", None), Tensor):
            what = (
                "it has no LM head" if head is None else f"its LM head is a {type(head).__name__}, not one linear layer"
            )
            raise BeagleError(f"{name}: {what}; choose a causal LM")
        self._head: Any = head
        self._apply: Any = packed(head.weight.detach(), head.bias) if pack and is_plain(head) else head
        self._scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
            getattr(config, "logits_scaling", 1.0) or 1.0
        )
        self._softcap = getattr(config, "final_logit_softcapping", None)

    @property
    def width(self) -> int:
        """Numbers that it reads of a token."""
        return int(self._head.weight.shape[-1])

    @property
    def _is_plain(self) -> bool:
        """Whether logits are the linear layer's outputs."""
        return self._scale == 1.0 and self._softcap is None

    def without_scale(self) -> LMHead:
        """The same without the config's scale and soft cap, which models that also see may not apply."""
        plain = copy.copy(self)
        plain._scale, plain._softcap = 1.0, None
        return plain

    def quantize(self) -> bool:
        """Multiply with int8 weights from now on; False: their shape can't be."""
        apply = quantized(self._head.weight.detach(), self._head.bias, "int8", VectorQuantizer())
        if apply is not None:
            self._apply = apply
        return apply is not None

    def shorten(self) -> bool:
        """Let ``likeliest`` leave out most of the weight from now on; False: it reads all of it."""
        if not (self._is_plain and isinstance(self._apply, Product)):
            return False
        self._apply.near = Near.of(self._head.weight.detach())
        return self._apply.near is not None

    def __call__(self, states: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., vocabulary]``, in the model's dtype."""
        out: Tensor = self._apply(states)
        if self._scale != 1.0:
            out = out * self._scale
        if self._softcap is not None:
            out = torch.tanh(out / self._softcap) * self._softcap
        return out

    def likeliest(self, states: Tensor) -> tuple[list[float], list[int]]:
        """The largest logit of each of ``states [rows, hidden]`` and the first token that has it."""
        if self._is_plain and isinstance(self._apply, Product | Int8Product):
            return self._apply.largest(states)
        values, tokens = tiled.largest(self(states))
        return values.tolist(), tokens.tolist()

    def rows(self, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[rows, hidden]`` and bias ``[rows]`` for some tokens (all if None).

        They carry the model's logit scale; a soft cap, which changes no order, is left out.
        """
        with present(self._head):
            weight: Tensor = self._head.weight
            bias: Tensor | None = self._head.bias
        if index is not None:
            weight, bias = weight[index], None if bias is None else bias[index]
        if self._scale != 1.0:
            weight, bias = weight * self._scale, None if bias is None else bias * self._scale
        return weight.detach(), None if bias is None else bias.detach()
