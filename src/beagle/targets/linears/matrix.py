"""Weights of linear layers as C++ of ours reads them (``Matrix`` in ``layers.h``)."""

from __future__ import annotations

from ctypes import Structure, c_int64, c_void_p
from typing import Any

import torch
from torch import Tensor

from beagle.targets.linears import tiled
from beagle.targets.linears.quantized import int4_weight, int8_weight

KINDS = {None: 0, "int8": 1, "int4": 2}


class Matrix(Structure):
    _fields_ = [("weight", c_void_p), ("scales", c_void_p), ("sums", c_void_p), ("bias", c_void_p), ("inputs", c_int64),
                ("out", c_int64), ("kind", c_int64)]  # fmt: skip


def matrix(weight: Tensor, bias: Tensor | None, kind: str | None, kept: list[Any]) -> Matrix:
    """
    Args:
        weight: bf16 ``[out, in]``, of a shape that ``tiled.fits`` in its kind.
        bias: bf16 ``[out]`` or None.
        kind: ``int8``, ``int4`` or None, which keeps bf16.
        kept: what the structure points to joins it.
    """
    weight = weight.detach()
    scales = sums = None
    if kind == "int8":
        own, whole = int8_weight(weight)
        ordered = tiled.tiled(whole)
        scales, sums = pointer(own, kept), pointer(whole.sum(1, dtype=torch.int32), kept)
    else:
        ordered = tiled.tiled_int4(*int4_weight(weight)) if kind == "int4" else tiled.half(weight)
    out, inputs = weight.shape
    own_bias = None if bias is None else pointer(bias, kept)
    return Matrix(pointer(ordered, kept), scales, sums, own_bias, inputs, out, KINDS[kind])


def pointer(tensor: Tensor, kept: list[Any]) -> int:
    """Of a tensor's data, which joins what is ``kept``."""
    kept.append(tensor.detach().contiguous())
    address: int = kept[-1].data_ptr()
    return address
