"""Short causal convolutions over the inputs of a token and of the few before it on its path.

transformers' layers hand such inputs to a cache, and convolve what it returns. Ours keeps the inputs of every token as it
keeps keys, so that a rejected token leaves no trace, and returns them with each token's own window.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from beagle.targets.attention import write
from beagle.targets.plan import Plan


class Windowed:
    """In a convolution's place of a tensor ``[batch, channels, tokens]``: each token is convolved by its own window.

    Attributes:
        windows: each token's inputs, oldest first, ``[batch, tokens, size, channels]``; zeros before the text's beginning.
        shape: of the tensor.
        dtype: of the inputs.
    """

    def __init__(self, windows: Tensor) -> None:
        self.windows = windows
        self.shape = torch.Size([windows.shape[0], windows.shape[3], windows.shape[1]])
        self.dtype = windows.dtype

    def to(self, dtype: torch.dtype) -> Windowed:
        """As of a tensor."""
        return self if dtype == self.dtype else Windowed(self.windows.to(dtype))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Tensor:
        """PyTorch's hook for its functions of such objects; there is one, the convolution ``[batch, channels, tokens]``."""
        if func is not F.conv1d:
            raise TypeError(f"a short convolution computes with {func.__name__}, which is not known here")
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        weight, bias, windows = given["weight"][:, 0].float(), given.get("bias"), given["input"].windows
        out = windows[:, :, 0].float() * weight[:, 0]
        for i in range(1, weight.shape[1]):
            out = out + windows[:, :, i].float() * weight[:, i]
        out = out if bias is None else out + bias.float()
        return out.to(windows.dtype).transpose(1, 2)


def windowed(plan: Plan, layer: int, inputs: Tensor, size: int) -> Windowed:
    """Write fresh inputs ``[batch, channels, tokens]`` into the cache of a plan, and give their windows."""
    fresh = inputs.transpose(1, 2)[:, None]
    held = write(plan, layer, fresh, fresh[..., :0])[0][:, 0]
    if size not in plan.before:
        plan.before[size] = _slots(plan, size)
    slots = plan.before[size]
    at = slots.clamp(min=0)
    found = held[plan.sequences.sequence[:, None], at][None] if plan.sequences is not None else held[:, at]
    return Windowed(found * (slots >= 0)[..., None])


def _slots(plan: Plan, size: int) -> Tensor:
    """The last ``size`` slots on each token's path, oldest first, ``[tokens, size]``; -1 before the text's beginning."""
    if plan.kind == "prompt":
        return plan.positions[0][:, None] - torch.arange(size, device=plan.positions.device).flip(0)
    seen = plan.masks[size][:, 0] == 0
    at = torch.arange(seen.shape[-1], device=seen.device)
    newest = torch.where(seen, at, -1).topk(min(size, seen.shape[-1])).values.flip(-1)  # later on a path, higher
    newest = F.pad(newest, (size - newest.shape[-1], 0), value=-1)
    if plan.sequences is not None:
        return newest.flatten(0, 1)[plan.sequences.place]
    if plan.tail is None:
        return newest[0]
    own = plan.tail.gather(1, (newest - plan.keys).clamp(min=0))
    return torch.where(newest < plan.keys, newest, own)
