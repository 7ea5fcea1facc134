"""Products with one weight by the CPU's kernel (``tiled``), whose order the weight takes."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from beagle.targets.linears import tiled

MOST_NEAR = 32  # vectors; the largest outputs of more of them need most of the weight


@dataclass(frozen=True)
class Near:
    """An int8 weight beside a bf16 one, which says which outputs may be the largest (``shortlist.h``).

    Attributes:
        ordered: as of ``tiled.tiled``.
        scales: fp32 ``[out]``.
        sums: of its rows, int32 ``[out]``.
        left: most that an output can be off for a vector of size 1, fp32 ``[out]``.
    """

    ordered: Tensor
    scales: Tensor
    sums: Tensor
    left: Tensor

    @classmethod
    def of(cls, weight: Tensor) -> Near | None:
        """
        Args:
            weight: bf16 ``[out, in]`` that ``tiled.fits``; None: as int8 it doesn't.
        """
        return None if weight.shape[1] % tiled.IN[torch.int8] else cls(*tiled.near(weight))


class Product:
    """``x [..., in] -> x @ weight.T + bias [..., out]``, all in bf16.

    Attributes:
        near: lets ``largest`` leave out most of the weight.
    """

    near: Near | None = None

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        """
        Args:
            weight: bf16 ``[out, in]`` that ``tiled.fits``.
            bias: bf16 ``[out]`` or None.
        """
        self._packed, self._bias, self._out = tiled.half(weight), bias, len(weight)

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.beagle.tiled_linear(_rows(x), self._packed, self._bias, self._out)
        return out.view(*x.shape[:-1], -1)

    def largest(self, x: Tensor) -> tuple[list[float], list[int]]:
        """The largest output of each of ``x [rows, in]`` and the first place where it is; NaN where some output is."""
        near = self.near
        if near is None or len(x) > MOST_NEAR:
            return tiled.largest_of_product(_in_pieces(x), self._packed, None, None, self._bias, self._out)
        return tiled.largest_of_product(
            _in_pieces(x), self._packed, near.scales, near.sums, self._bias, self._out, near.ordered, near.left
        )


class Int8Product:
    """The same with an int8 weight that fits, and ``scales [out]`` in fp32."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self._ordered, self._sums = tiled.tiled(weight), weight.sum(1, dtype=torch.int32)
        self._scales, self._bias = scales, bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.beagle.tiled_linear_int8(_rows(x), self._ordered, self._scales, self._sums, self._bias)
        return out.view(*x.shape[:-1], -1)

    def largest(self, x: Tensor) -> tuple[list[float], list[int]]:
        """As of ``Product``."""
        scales, sums = self._scales, self._sums
        return tiled.largest_of_product(_in_pieces(x), self._ordered, scales, sums, self._bias, len(scales))


class Int4Product:
    """The same with an int4 weight as of ``tiled.tiled_int4``."""

    def __init__(self, whole: Tensor, scales: Tensor, middles: Tensor, bias: Tensor | None) -> None:
        self._ordered, self._bias = tiled.tiled_int4(whole, scales, middles), bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.beagle.tiled_linear_int4(_rows(x), self._ordered, self._bias)
        return out.view(*x.shape[:-1], -1)


def _in_pieces(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
