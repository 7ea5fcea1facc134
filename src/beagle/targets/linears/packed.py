"""Linear layers whose weights lie in the CPU kernel's own order, instead of being reordered at every call."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.targets.linears import tiled
from beagle.targets.linears.product import Product

Apply = Callable[[Tensor], Tensor]
PACKED_DTYPES = (torch.bfloat16, torch.float16)  # fp32 products take plain weights at full speed
PACKED_TOKENS = 16  # the number of tokens that the order is chosen for; any number works


def packed(weight: Tensor, bias: Tensor | None = None) -> Apply:
    """``x [..., in] -> x @ weight.T + bias [..., out]``; packed on a CPU in half precision, plain elsewhere.

    By our own kernel where it was built, which is for few vectors.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
    """
    return Product(weight, bias) if tiled.fits(weight) else _reordered(weight, bias)


def _reordered(weight: Tensor, bias: Tensor | None) -> Apply:
    if weight.device.type == "cpu" and weight.dtype in PACKED_DTYPES and torch.backends.mkldnn.is_available():
        try:
            ordered = torch.ops.mkldnn._reorder_linear_weight(weight, PACKED_TOKENS)
            apply = torch.ops.mkldnn._linear_pointwise
            kind = apply, weight.dtype, weight.shape, bias is not None
            if kind not in _agreed and _agrees(apply, ordered, weight, bias):
                _agreed.add(kind)
            if kind in _agreed:
                return lambda x: apply(x, ordered, bias, "none", [], "")
        except (RuntimeError, AttributeError, NotImplementedError):
            pass  # another build of torch: these operators are not public
    return lambda x: F.linear(x, weight, bias)


# products that were compared: the order of a weight depends on its shape alone
_agreed: set[tuple[object, ...]] = set()


def _agrees(apply: Callable[..., Tensor], ordered: Tensor, weight: Tensor, bias: Tensor | None) -> bool:
    """Whether the packed product is the plain one; another order of summation rounds otherwise, by a share of the largest sum."""
    probe = torch.ones(2, weight.shape[1], dtype=weight.dtype)
    ours, plain = apply(probe, ordered, bias, "none", [], ""), F.linear(probe, weight, bias)
    return torch.allclose(ours, plain, rtol=0.02, atol=0.02 * float(plain.abs().max()))


class PackedLinear(nn.Module):
    """Stands in for one ``nn.Linear`` of a target, keeping the packed or quantised weight only."""

    def __init__(self, linear: nn.Linear, apply: Apply) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._apply_to, self._dtype = apply, linear.weight.dtype

    @property
    def weight(self) -> Tensor:
        """For modules that ask a layer's weight for its dtype; on no device, since its numbers aren't kept in this form."""
        return torch.empty(self.out_features, self.in_features, dtype=self._dtype, device="meta")

    def forward(self, x: Tensor) -> Tensor:
        return self._apply_to(x)


def is_plain(module: nn.Module | None) -> TypeGuard[nn.Linear]:
    """Whether a module is PyTorch's linear layer and no more."""
    return type(module) is nn.Linear and is_untouched(module)


def is_untouched(module: nn.Module) -> bool:
    """Whether a module has a plain weight and its class's forward: a checkpoint that is quantised has others in some."""
    return type(module._parameters.get("weight")) is nn.Parameter and not (
        "forward" in vars(module) or module._forward_hooks or module._forward_pre_hooks
    )


def pack_linears(module: nn.Module) -> None:
    """Replace every plain ``nn.Linear`` below ``module``, in place, where packing makes it faster."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if is_plain(child) and child.weight.device.type == "cpu" and child.weight.dtype in PACKED_DTYPES:
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, PackedLinear(child, _reordered(child.weight.detach(), bias)))


def tile_linears(module: nn.Module) -> None:
    """Replace every plain ``nn.Linear`` below ``module`` that our kernel takes, in place, before a graph is traced."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if is_plain(child) and tiled.fits(child.weight):
                bias = None if child.bias is None else child.bias.detach()
                setattr(parent, name, PackedLinear(child, Product(child.weight, bias)))


class ReadLinear(nn.Linear):
    """A layer whose weight the module around it reads by itself (Mamba's step sizes), so that it stays as it is."""


@torch.no_grad()
def keep_read_linears(base: nn.Module) -> None:
    """Make each plain ``nn.Linear`` that is not called, though the module around it is, a ``ReadLinear``.

    Args:
        base: a causal LM without its LM head. Only those with convolutions are known to have such layers, so that all
            others are spared the pass.
    """
    if not any(isinstance(module, nn.Conv1d) for module in base.modules()):
        return
    called: set[nn.Module] = set()

    def note(module: nn.Module, inputs: object) -> None:
        called.add(module)

    device = next(base.parameters()).device
    with ExitStack() as hooks:
        for module in base.modules():
            hooks.enter_context(module.register_forward_pre_hook(note))
        base(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    for module in called:
        for child in module.children():
            if type(child) is nn.Linear and child not in called:
                child.__class__ = ReadLinear
