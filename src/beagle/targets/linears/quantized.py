"""Linear layers with int8 or int4 weights, a function of each input vector alone.

``int8``: weights with a scale per output channel. Each vector of the input becomes whole numbers of 15 bits
with a scale of its own, as two vectors of int8: coarse, and what that leaves. (One alone would drown the rest
of a state beside its few huge entries.) The product is one of integers and therefore exact: it does not
depend on how many vectors share it, nor on the order of its sums. It also is what CPUs multiply fastest; PyTorch's
weight-only int8 kernel computes in fp32, and verification is made of passes of many tokens.

``int4``: weights in groups of ``GROUP`` inputs with a scale and an offset. Our CPU kernel rounds the input to int8, in
groups of as many with a scale each; elsewhere it stays as it is. The LM head is int8 beside it: in four bits it would move
the target's answers further than all layers together.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.targets.linears import tiled
from beagle.targets.linears.packed import Apply, PackedLinear, is_plain
from beagle.targets.linears.product import Int4Product, Int8Product

KINDS = ("int8", "int4")
GROUP = 32
BITS = {"int8": 8, "int4": 5}  # of memory a weight, a group's scale and offset shared among its weights
FINE = 254  # steps of the fine vector in one of the coarse one: the rest of a rounding is -127 … 127 of them
INT_MM_VECTORS = 32  # CUDA's integer product takes more than 16 vectors, in multiples of 8


def check_kind(kind: str | None) -> None:
    """
    Raises:
        BeagleError: there is no such kind of quantisation.
    """
    if kind is not None and kind not in KINDS:
        raise BeagleError(f"quantize '{kind}' is unknown; use {' or '.join(KINDS)}, or leave it out")


class VectorQuantizer:
    """Vectors in whole numbers with a scale each; layers that read the same tensor (q, k, v; gate, up) share the work."""

    def __init__(self) -> None:
        self._last: tuple[Tensor, int, tuple[Tensor, Tensor]] | None = None

    def __call__(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """``[..., in]`` -> int8 ``[2 * n, in]``, the n coarse vectors before the fine ones, and fp32 scales ``[n, 1]``."""
        last = self._last
        if last is not None and last[0] is x and last[1] == x._version:
            return last[2]
        vectors = x.reshape(-1, x.shape[-1]).float()
        scales = vectors.abs().amax(-1, keepdim=True).clamp_(min=1e-12).div_(127)
        steps = vectors / scales
        coarse = steps.round()
        fine = steps.sub_(coarse).mul_(FINE).round_()
        both = torch.cat([coarse, fine]).to(torch.int8), scales
        self._last = x, x._version, both
        return both


def quantized(weight: Tensor, bias: Tensor | None, kind: str, quantizer: VectorQuantizer) -> Apply | None:
    """``x [..., in] -> x @ weight.T + bias [..., out]`` with quantised weights; None if the shape can't be.

    Args:
        weight: ``[out, in]``.
        bias: ``[out]`` or None.
        kind: ``int8`` or ``int4``.
        quantizer: shared by layers with the same input.

    Raises:
        BeagleError: this build of PyTorch has no right kernel for it here.
    """
    if not _fits(weight, kind):
        return None
    try:
        apply = _int8(weight, bias, quantizer) if kind == "int8" else _int4(weight, bias)
        right = _is_right(apply, weight, bias, kind)
    except (RuntimeError, AttributeError, NotImplementedError) as error:
        reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise _missing(weight, kind, reason) from error
    if not right:
        raise _missing(weight, kind, "its products are wrong")
    return apply


def quantize_linears(module: nn.Module, kind: str) -> list[str]:
    """Replace every plain ``nn.Linear`` below ``module``, in place; the names of those whose shape can't be."""
    quantizer = VectorQuantizer()
    left = []
    for where, parent in list(module.named_modules()):
        for name, child in list(parent.named_children()):
            if not is_plain(child):
                continue
            bias = None if child.bias is None else child.bias.detach()
            apply = quantized(child.weight.detach(), bias, kind, quantizer)
            if apply is None:
                left.append(f"{where}.{name}".strip("."))
            else:
                setattr(parent, name, PackedLinear(child, apply))
    return left


def _fits(weight: Tensor, kind: str) -> bool:
    outputs, inputs = weight.shape
    cuda = weight.device.type == "cuda"
    if kind == "int8":
        return not cuda or (outputs % 8 == 0 and inputs % 8 == 0)
    return outputs % 16 == 0 and inputs % (128 if cuda else GROUP) == 0  # CUDA's order takes 8 tiles of 16 inputs


def _int8(weight: Tensor, bias: Tensor | None, quantizer: VectorQuantizer) -> Apply:
    scales, whole = int8_weight(weight)
    if weight.dtype == torch.bfloat16 and tiled.fits(whole):
        return Int8Product(whole, scales, bias)
    turned = whole.t()
    cuda = weight.device.type == "cuda"

    def apply(x: Tensor) -> Tensor:
        quants, own = quantizer(x)
        n = quants.shape[0]  # not len(): a traced pass keeps it open
        if cuda and (n <= 16 or n % 8):
            missing = max(INT_MM_VECTORS - n, -n % 8)
            quants = F.pad(quants, (0, 0, 0, missing))
        sums = torch._int_mm(quants, turned)[:n].float()
        coarse, fine = sums.chunk(2)
        out = coarse.add_(fine, alpha=1 / FINE).mul_(scales).mul_(own)
        if bias is not None:
            out += bias
        return out.to(x.dtype).view(*x.shape[:-1], -1)

    return apply


def int8_weight(weight: Tensor) -> tuple[Tensor, Tensor]:
    """Scales ``[out]`` and int8 ``[out, in]``."""
    scales = weight.abs().amax(1).float().clamp_(min=1e-12).div_(127)
    return scales, (weight / scales[:, None]).round_().to(torch.int8)


def _int4(weight: Tensor, bias: Tensor | None) -> Apply:
    outputs, inputs = weight.shape
    whole, scales, middles = int4_weight(weight)
    if weight.dtype == torch.bfloat16 and tiled.fits(whole):
        return Int4Product(whole, scales, middles, bias)
    table = torch.stack([scales, middles], dim=-1).transpose(0, 1).contiguous()  # [groups, out, 2]
    if weight.device.type == "cpu":
        ordered = torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1)
        product = torch.ops.aten._weight_int4pack_mm_for_cpu
    else:
        pairs = (whole[:, ::2] << 4 | whole[:, 1::2]).to(torch.uint8)
        ordered = torch.ops.aten._convert_weight_to_int4pack(pairs, 8)
        product = torch.ops.aten._weight_int4pack_mm

    def apply(x: Tensor) -> Tensor:
        out = product(x.reshape(-1, inputs).contiguous(), ordered, GROUP, table).view(*x.shape[:-1], outputs)
        return out if bias is None else out + bias

    return apply


def int4_weight(weight: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Values 0 … 15 ``[out, in]``, scales and what 8 stands for ``[out, groups]``, both in the weight's dtype."""
    groups = weight.float().view(len(weight), -1, GROUP)
    low, high = groups.amin(-1), groups.amax(-1)
    scales = ((high - low) / 15).clamp_(min=1e-8).to(weight.dtype)
    middles = (low + 8 * scales.float()).to(weight.dtype)
    whole = (groups - middles.float()[..., None]) / scales.float()[..., None] + 8
    return whole.round_().clamp_(0, 15).view_as(weight).to(torch.uint8), scales, middles


def dequantized(weight: Tensor, kind: str) -> Tensor:
    """The fp32 weights ``[out, in]`` that the quantised layer multiplies with."""
    if kind == "int8":
        scales, whole = int8_weight(weight)
        return whole.float() * scales[:, None]
    whole, scales, middles = int4_weight(weight)
    groups = (whole.float() - 8).view(*scales.shape, GROUP) * scales.float()[..., None] + middles.float()[..., None]
    return groups.view_as(weight)


def _is_right(apply: Apply, weight: Tensor, bias: Tensor | None, kind: str) -> bool:
    """Whether the kernel multiplies as it should, up to rounding, tried on some of the outputs."""
    index = torch.arange(0, len(weight), max(1, len(weight) // 256), device=weight.device)
    plain = dequantized(weight[index], kind)
    random = torch.Generator().manual_seed(0)
    x = torch.randn(2, weight.shape[1], generator=random).to(weight.device, weight.dtype)
    expected = F.linear(x.float(), plain, None if bias is None else bias[index].float())
    size = x.float().norm(dim=1, keepdim=True) * plain.norm(dim=1) + expected.abs()
    return bool(((apply(x)[:, index].float() - expected).abs() <= 0.02 * size).all())


def _missing(weight: Tensor, kind: str, reason: str) -> BeagleError:
    dtype = str(weight.dtype).removeprefix("torch.")
    other = KINDS[1 - KINDS.index(kind)]
    return BeagleError(
        f"quantize {kind}: PyTorch {torch.__version__} has no kernel for {dtype} on {weight.device.type} "
        f"({reason}); use {other} or leave it out"
    )
