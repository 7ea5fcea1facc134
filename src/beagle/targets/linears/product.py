"""Products with one weight by the CPU's kernel (``tiled``), whose order the weight takes."""

from __future__ import annotations

import torch
from torch import Tensor

from beagle.targets.linears import tiled


class Product:
    """``x [..., in] -> x @ weight.T + bias [..., out]``, all in bf16."""

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

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``tiled.largest`` of the outputs of ``x [rows, in]``."""
        return tiled.largest_of_product(_rows(x), self._packed, None, None, self._bias, self._out)


class Int8Product:
    """The same with an int8 weight that fits, and ``scales [out]`` in fp32."""

    def __init__(self, weight: Tensor, scales: Tensor, bias: Tensor | None) -> None:
        self._ordered, self._sums = tiled.tiled(weight), weight.sum(1, dtype=torch.int32)
        self._scales, self._bias = scales, bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.beagle.tiled_linear_int8(_rows(x), self._ordered, self._scales, self._sums, self._bias)
        return out.view(*x.shape[:-1], -1)

    def largest(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """As of ``Product``."""
        return tiled.largest_of_product(
            _rows(x), self._ordered, self._scales, self._sums, self._bias, len(self._scales)
        )


class Int4Product:
    """The same with an int4 weight as of ``tiled.tiled_int4``."""

    def __init__(self, whole: Tensor, scales: Tensor, middles: Tensor, bias: Tensor | None) -> None:
        self._ordered, self._bias = tiled.tiled_int4(whole, scales, middles), bias

    def __call__(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.beagle.tiled_linear_int4(_rows(x), self._ordered, self._bias)
        return out.view(*x.shape[:-1], -1)


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]).contiguous()
