"""RMSNorm of draft heads: PyTorch's, which on CPUs keeps every step of the calculation for the backward pass."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class RMSNorm(nn.RMSNorm):
    """As PyTorch's, with less memory and time in training on CPUs."""

    def forward(self, x: Tensor) -> Tensor:
        assert self.eps is not None
        return rms_norm(x, self.eps, self.weight)


def rms_norm(x: Tensor, eps: float, weight: Tensor | None = None) -> Tensor:
    """``x [..., width]`` over the root of its mean square, times ``weight [width]``."""
    if torch.is_grad_enabled() and x.device.type == "cpu" and x.dtype != torch.bfloat16:
        normed: Tensor = _KeepInput.apply(x, weight, eps)
        return normed
    return F.rms_norm(x, x.shape[-1:], weight, eps)


class _KeepInput(torch.autograd.Function):
    """The norm is made anew in the backward pass: what it is made of is kept by others, too."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
        scale = torch.rsqrt(x.square().mean(-1, keepdim=True) + eps)
        ctx.save_for_backward(x, scale, weight)
        normed = x * scale
        return normed if weight is None else normed.mul_(weight)

    @staticmethod
    def backward(ctx: Any, *outputs: Tensor) -> tuple[Tensor | None, ...]:
        (output,) = outputs
        x, scale, weight = ctx.saved_tensors
        normed = x * scale
        of_x = of_weight = None
        if ctx.needs_input_grad[0]:
            wide = output if weight is None else output * weight
            along = torch.linalg.vecdot(wide, normed)[..., None] / -x.shape[-1]
            of_x = torch.addcmul(wide, normed, along).mul_(scale)
        if ctx.needs_input_grad[1]:
            of_weight = normed.mul_(output).flatten(0, -2).sum(0)
        return of_x, of_weight, None
