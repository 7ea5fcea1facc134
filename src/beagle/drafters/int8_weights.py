"""Matrices of a draft checkpoint as int8 with a scale a row: half of bfloat16's size on disk, the same in memory."""

from __future__ import annotations

import torch
from torch import Tensor

SCALE = ".scale"  # ends the name of what a stored matrix's rows are multiplied with


def to_int8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Store the matrices so that each weight is off by at most half a step of its row, the largest weight's 254th.

    Args:
        tensors: of a head.
    Returns:
        int8 matrices and, under the name with ``.scale``, fp32 ``[rows, 1]``; the rest in bfloat16, integers as they were.
    """
    stored: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if tensor.is_floating_point() and tensor.ndim == 2:
            weight = tensor.float()
            scale = weight.abs().amax(1, keepdim=True).clamp(min=2.0**-100) / 127  # a row of zeros has one too
            stored[name], stored[name + SCALE] = (weight / scale).round().to(torch.int8), scale
        else:
            stored[name] = tensor.bfloat16() if tensor.is_floating_point() else tensor
    return stored


def from_int8(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """What ``to_int8`` was given, in fp32 where it was rounded.

    Raises:
        KeyError: a scale is missing, or its matrix.
    """
    weights = {name: tensor for name, tensor in tensors.items() if not name.endswith(SCALE)}
    for name in [name for name in tensors if name.endswith(SCALE)]:
        matrix = name.removesuffix(SCALE)
        weights[matrix] = weights[matrix].float() * tensors[name]
    if missing := [name for name, tensor in weights.items() if tensor.dtype == torch.int8]:
        raise KeyError(missing[0] + SCALE)
    return weights
