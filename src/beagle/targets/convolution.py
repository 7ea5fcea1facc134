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


class Windowed(Tensor):
    """Inputs ``[batch, channels, tokens]`` that a causal convolution reads by windows, not by their order.

    Attributes:
        windows: each token's, oldest first, ``[batch, tokens, size, channels]``; zeros before the text's beginning.
    """

    windows: Tensor

    @classmethod
    def of(cls, inputs: Tensor, windows: Tensor) -> Windowed:
        """
        Args:
            inputs: of the tokens.
            windows: theirs.
        """
        self = inputs.as_subclass(cls)
        self.windows = windows
        return self

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        """PyTorch's hook for functions of tensors: the convolution is ours, whatever else gives plain tensors."""
        if func is not F.conv1d:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        given = dict(zip(("input", "weight", "bias"), args, strict=False)) | dict(kwargs or {})
        weight, bias = given["weight"][:, 0].float(), given.get("bias")
        windows = given["input"].windows
        out = sum(windows[:, :, i].float() * weight[:, i] for i in range(weight.shape[1]))
        out = out if bias is None else out + bias.float()
        return out.to(given["weight"].dtype).transpose(1, 2)


def windowed(plan: Plan, layer: int, inputs: Tensor, size: int) -> Windowed:
    """Write fresh inputs ``[batch, channels, tokens]`` into the cache of a plan, and give them with their windows.

    Args:
        plan: of the pass.
        layer: whose inputs they are.
        inputs: the fresh ones.
        size: of a window, the token's own input included.
    """
    fresh = inputs.transpose(1, 2)[:, None]
    held = write(plan, layer, fresh, fresh[..., :0])[0][:, 0]
    if size not in plan.before:
        plan.before[size] = _slots(plan, size)
    slots = plan.before[size]
    at = slots.clamp(min=0)
    found = held[plan.sequences.sequence[:, None], at][None] if plan.sequences is not None else held[:, at]
    return Windowed.of(inputs, found * (slots >= 0)[..., None])


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
