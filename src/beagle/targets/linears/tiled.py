"""Linear layers and attention of passes of few tokens, by a CPU kernel of ours (``kernel.cpp``).

``beagle compile`` builds the kernel, where the CPU multiplies bf16, and keeps it in the user's cache.
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from beagle.targets.linears import library

OUT = 16  # outputs of a tile
IN = {torch.bfloat16: 32, torch.int8: 64, torch.uint8: 64}  # what a weight's inputs are a multiple of; uint8: int4
HALF_BITS = 12  # of memory a bf16 weight
SOURCE = Path(__file__).with_name("kernel.cpp")
SHIMS = (  # how compiled graphs call it
    "AOTITorchError aoti_torch_cpu_tiled_linear("
    "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, int64_t out, AtenTensorHandle* y)",
    "AOTITorchError aoti_torch_cpu_tiled_linear_int8(AtenTensorHandle x, AtenTensorHandle weight, "
    "AtenTensorHandle scales, AtenTensorHandle sums, AtenTensorHandle* bias, AtenTensorHandle* y)",
    "AOTITorchError aoti_torch_cpu_tiled_linear_int4("
    "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* y)",
    "AOTITorchError aoti_torch_cpu_attend(AtenTensorHandle q, AtenTensorHandle k, AtenTensorHandle v, "
    "AtenTensorHandle mask, double scale, AtenTensorHandle* y)",
)

CLEARLY = 1.25  # of times: passes and drafts in C++ gain from the kernel besides, so that a tie is not its end

_kernel: Any = None  # the library, once it is loaded
_operators = torch.library.Library("beagle", "DEF")  # for tracing: what a graph calls
_operators.define("tiled_linear(Tensor x, Tensor weight, Tensor? bias, int out) -> Tensor")
_operators.define("tiled_linear_int8(Tensor x, Tensor weight, Tensor scales, Tensor sums, Tensor? bias) -> Tensor")
_operators.define("tiled_linear_int4(Tensor x, Tensor weight, Tensor? bias) -> Tensor")
_operators.define("attend(Tensor q, Tensor k, Tensor v, Tensor mask, float scale) -> Tensor")


@torch.library.register_fake("beagle::tiled_linear", lib=_operators)
def _half_shape(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    return x.new_empty(x.shape[0], out)


@torch.library.register_fake("beagle::tiled_linear_int8", lib=_operators)
@torch.library.register_fake("beagle::tiled_linear_int4", lib=_operators)
def _shape(x: Tensor, weight: Tensor, *others: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.impl(_operators, "tiled_linear", "CPU")
def _product(x: Tensor, weight: Tensor, bias: Tensor | None, out: int) -> Tensor:
    y = _half_shape(x, weight, bias, out)
    _kernel.tiled_linear(*_pointers(x, weight, bias, y), x.shape[0], x.shape[1], out)
    return y


@torch.library.impl(_operators, "tiled_linear_int8", "CPU")
def _product_int8(x: Tensor, weight: Tensor, scales: Tensor, sums: Tensor, bias: Tensor | None) -> Tensor:
    out = _shape(x, weight)
    pointers = _pointers(x, weight, scales, sums, bias, out)
    _kernel.tiled_linear_int8(*pointers, x.shape[0], x.shape[1], weight.shape[0])
    return out


@torch.library.impl(_operators, "tiled_linear_int4", "CPU")
def _product_int4(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    out = _shape(x, weight)
    _kernel.tiled_linear_int4(*_pointers(x, weight, bias, out), x.shape[0], x.shape[1], weight.shape[0])
    return out


@torch.library.register_fake("beagle::attend", lib=_operators)
def _attended(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    return q.new_empty(*q.shape[:3], v.shape[3])


@torch.library.impl(_operators, "attend", "CPU")
def _attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    out = _attended(q, k, v, mask, scale)
    sizes = (ctypes.c_int64 * 6)(*q.shape[:3], k.shape[2], q.shape[3], v.shape[3])
    strides = [_strides(tensor) for tensor in (k, v, mask)]
    _kernel.attend(*_pointers(q, k, v, mask, out), sizes, *strides, scale)
    return out


def _strides(tensor: Tensor) -> Any:
    """Of the first three dimensions; 0 where one entry stands for all."""
    return (ctypes.c_int64 * 3)(
        *(along if n > 1 else 0 for n, along in zip(tensor.shape[:3], tensor.stride(), strict=False))
    )


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor, scale: float) -> Tensor:
    """Softmax attention of few queries, ``[batch, heads, rows, inputs]`` to ``[batch, heads, rows, outputs]``.

    Args:
        q: queries, where ``attends``.
        k: keys ``[batch, heads, keys, inputs]``, the rows of a head in one piece.
        v: values ``[batch, heads, keys, outputs]``, likewise.
        mask: additive ``[batch or 1, heads or 1, rows or 1, keys]``, its rows in one piece.
        scale: of scores.
    """
    out: Tensor = torch.ops.beagle.attend(q.contiguous(), k, v, mask, scale)
    return out


def largest(x: Tensor) -> tuple[Tensor, Tensor]:
    """The largest of each row ``[rows, n]`` and the first place where it is; NaN where some entry is.

    ``Tensor.max`` takes several times as long in bf16.
    """
    if used(x.dtype) is None or not x.is_cpu:
        values, places = x.max(-1)
        return values, places
    x = x.contiguous()
    values, places = x.new_empty(len(x)), torch.empty(len(x), dtype=torch.int64)
    _kernel.largest(*_pointers(x, values, places), *x.shape)
    return values, places


def largest_of_product(
    x: Tensor,
    weight: Tensor,
    scales: Tensor | None,
    sums: Tensor | None,
    bias: Tensor | None,
    out: int,
    near: Tensor | None = None,
    left: Tensor | None = None,
) -> tuple[list[float], list[int]]:
    """``largest`` of a product's rows, which are not kept.

    Args:
        x: bf16 ``[rows, in]``, each row in one piece.
        weight: as of ``half``, or of ``tiled`` where there are ``scales`` and nothing is ``near``.
        scales: of an int8 weight, fp32 ``[out]``.
        sums: of its rows, int32 ``[out]``.
        bias: bf16 ``[out]`` or None.
        out: outputs of the product.
        near: an int8 weight beside one of ``half``, as of ``tiled``; scales and sums are its own.
        left: how far an output may be from that of ``near`` for a vector of size 1, fp32 ``[out]``.
    """
    rows, inputs = x.shape
    values, places = (ctypes.c_float * rows)(), (ctypes.c_int64 * rows)()
    kind = int(scales is not None and near is None)
    pointers = _pointers(x, weight, scales, sums, bias, near, left)
    _kernel.largest_of_product(*pointers, values, places, rows, x.stride(0), inputs, out, kind)
    return values[:], places[:]


def move_slots(cache: Tensor, sources: list[int], places: list[int]) -> None:
    """Move slots of a contiguous cache on a CPU, ``[..., slots, dim]``, one after another to places before their own."""
    both = [(ctypes.c_int64 * len(sources))(*of) for of in (sources, places)]
    slots, dim = cache.shape[-2:]
    heads = cache.numel() // (slots * dim)
    _kernel.move_slots(cache.data_ptr(), *both, len(sources), heads, slots, dim * cache.element_size())


def attends(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the kernel computes attention of such queries, keys and values."""
    in_one_piece = all(tensor.stride()[2:] == (tensor.shape[3], 1) for tensor in (k, v))
    return used(q.dtype) is not None and q.is_cpu and q.shape[3] % 32 == 0 and v.shape[3] % 16 == 0 and in_one_piece


def _pointers(*tensors: Tensor | None) -> list[int]:
    return [0 if tensor is None else tensor.data_ptr() for tensor in tensors]


def kernel() -> Any:
    """The library, or None."""
    return _kernel


def loaded() -> bool:
    """Whether the kernel is at hand."""
    return _kernel is not None


def used(dtype: torch.dtype) -> str | None:
    """The kernel's version if a model of this dtype uses it here."""
    return version() if loaded() and dtype == torch.bfloat16 else None


def c_shims() -> dict[Any, list[str]]:
    """Operators that graphs call without going through Python, for inductor."""
    ours = torch.ops.beagle
    operators = (
        ours.tiled_linear.default,
        ours.tiled_linear_int8.default,
        ours.tiled_linear_int4.default,
        ours.attend.default,
    )
    return {operator: [shim] for operator, shim in zip(operators, SHIMS, strict=True)} if loaded() else {}


def version() -> str:
    """Another source, PyTorch or instruction set is another library."""
    return library.version(SOURCE)


def load(folder: Path) -> bool:
    """Load what ``build`` made; False if there is nothing that works here.

    Args:
        folder: of all packages.
    """
    global _kernel
    path = library.path(folder, "kernel", SOURCE)
    if _kernel is None and path.is_file():
        try:
            # global: compiled graphs find its symbols
            kernel = ctypes.CDLL(str(path), mode=ctypes.RTLD_GLOBAL)
            functions = (kernel.tiled_linear, 4), (kernel.tiled_linear_int8, 6), (kernel.tiled_linear_int4, 4)
            for function, pointers in functions:
                function.argtypes = [ctypes.c_void_p] * pointers + [ctypes.c_int64] * 3
                function.restype = None
            kernel.attend.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_double]
            kernel.attend.restype = None
            for function in (kernel.count_high_bytes, kernel.pack_weight):
                function.argtypes = [ctypes.c_void_p] * 2 + [ctypes.c_int64] * 2
                function.restype = None
            kernel.pack_near_weight.argtypes = [ctypes.c_void_p] * 5 + [ctypes.c_int64] * 2
            kernel.pack_near_weight.restype = None
            for function in (kernel.largest, kernel.gumbel):
                function.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 2
                function.restype = None
            kernel.draw.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 2 + [ctypes.c_double]
            kernel.draw.restype = None
            kernel.largest_of_product.argtypes = [ctypes.c_void_p] * 9 + [ctypes.c_int64] * 5
            kernel.largest_of_product.restype = None
            kernel.move_slots.argtypes = [ctypes.c_void_p] * 3 + [ctypes.c_int64] * 4
            kernel.move_slots.restype = None
        except (OSError, AttributeError):
            return False
        _kernel = kernel
    return loaded()


def build(folder: Path) -> str | None:
    """Compile the kernel for this machine and load it.

    Args:
        folder: of all packages.

    Returns:
        Why there is none; None: it is loaded.
    """
    if load(folder):
        return None
    torch_folder = Path(torch.__file__).parent
    links = [f"-I{torch_folder / 'include'}", f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    reason = library.build(library.path(folder, "kernel", SOURCE), SOURCE, links)
    if reason is not None:
        return reason
    if not load(folder):
        return "what was built can't be loaded"
    return None if _is_kept() else _remove(folder)


def _remove(folder: Path) -> str:
    global _kernel
    _kernel = None
    library.path(folder, "kernel", SOURCE).unlink()
    return "they are faster here"


def _is_kept() -> bool:
    """Whether PyTorch's own products are not clearly faster here, in bf16 and in int4."""
    weights = [torch.randn(1536, 576).bfloat16() for _ in range(40)]  # more than caches hold
    packed = [torch.ops.mkldnn._reorder_linear_weight(weight, 16) for weight in weights]
    whole = torch.randint(16, (1536, 576), dtype=torch.uint8)
    table = torch.ones(576 // 32, 1536, 2, dtype=torch.bfloat16)
    ours = [tiled_int4(whole, table[..., 0].T, table[..., 1].T) for _ in weights]
    theirs = [torch.ops.aten._convert_weight_to_int4pack_for_cpu(whole.int(), 1) for _ in weights]
    ordered = [half(weight) for weight in weights]
    multiply, multiply_int4 = torch.ops.mkldnn._linear_pointwise, torch.ops.aten._weight_int4pack_mm_for_cpu
    return _keeps_up(
        lambda x: [_product(x, weight, None, 1536) for weight in ordered],
        lambda x: [multiply(x, weight, None, "none", [], "") for weight in packed],
    ) and _keeps_up(
        lambda x: [_product_int4(x, weight, None) for weight in ours],
        lambda x: [multiply_int4(x, weight, 32, table) for weight in theirs],
    )


def _keeps_up(ours: Callable[[Tensor], object], theirs: Callable[[Tensor], object]) -> bool:
    """Whether one is as fast as the other for the numbers of vectors that decoding has, as far as a busy machine shows."""
    seconds = [0.0, 0.0]
    for vectors in (1, 12):
        x = torch.randn(vectors, 576).bfloat16()
        runs: list[list[float]] = [[], []]
        for _ in range(7):
            for run, product in zip(runs, (ours, theirs), strict=True):
                began = time.perf_counter()
                product(x)
                run.append(time.perf_counter() - began)
        for i, run in enumerate(runs):
            seconds[i] += min(run)
    return seconds[0] < CLEARLY * seconds[1]


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes a weight ``[out, in]``: bf16, int8, or int4's values 0 … 15 in uint8."""
    return (
        loaded()
        and weight.device.type == "cpu"
        and weight.dtype in IN
        and weight.shape[0] % OUT == 0
        and weight.shape[1] % IN[weight.dtype] == 0
    )


def half(weight: Tensor) -> Tensor:
    """A bf16 weight ``[out, in]`` that ``fits`` in 12 bits a number, without loss, as of ``half.h``: bytes ``[…]``."""
    out, inputs = weight.shape
    weight = weight.detach().contiguous()
    counts = torch.zeros(-(-out // (2 * OUT)), 256, dtype=torch.int32)
    _kernel.count_high_bytes(*_pointers(weight, counts), inputs, out)
    table = counts.sum(0).topk(16).indices
    patches = counts.sum(1) - counts[:, table].sum(1)
    before = torch.cat([patches.new_zeros(1), patches.cumsum(0)])
    tiles, patch = out * inputs * HALF_BITS // 8, 8  # bytes of all; of one
    packed = torch.zeros(tiles + 16 + 4 * len(before) + patch * int(before[-1]), dtype=torch.uint8)
    packed[tiles : tiles + 16] = table.to(torch.uint8)
    packed[tiles + 16 : tiles + 16 + 4 * len(before)] = before.to(torch.int32).view(torch.uint8)
    _kernel.pack_weight(*_pointers(weight, packed), inputs, out)
    return packed


def near(weight: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """What stands beside a bf16 weight ``[out, in]`` of an int8 weight's shape, as of ``shortlist.h``.

    Returns:
        The int8 weight as of ``tiled``; its scales, the sums of its rows, and most that an output can be off for a vector of size
        1, each ``[out]``.
    """
    weight, count = weight.detach().contiguous(), len(weight)
    found = (
        torch.empty(weight.shape, dtype=torch.int8), torch.empty(count),
        torch.empty(count, dtype=torch.int32), torch.empty(count),
    )  # fmt: skip
    _kernel.pack_near_weight(*_pointers(weight, *found), weight.shape[1], count)
    return found


def tiled(weight: Tensor) -> Tensor:
    """An int8 weight ``[out, in]`` in the kernel's order, same shape: tiles ``[out / 16, …]`` of 1 KiB each, as of ``tiles.h``."""
    out, inputs = weight.shape
    tiles = weight.view(out // OUT, OUT, inputs // 64, 16, 4)
    return tiles.permute(0, 2, 3, 1, 4).contiguous().view(out, inputs)


def tiled_int4(whole: Tensor, scales: Tensor, middles: Tensor) -> Tensor:
    """An int4 weight in the kernel's order, as of ``kernel.cpp``: bytes ``[out, in * 5 / 8]``.

    Args:
        whole: values 0 … 15, uint8 ``[out, in]``.
        scales: of groups of 32 inputs, bf16 ``[out, groups]``.
        middles: what 8 stands for, likewise.
    """
    out, groups = scales.shape
    blocks = out // OUT
    # [blocks, groups, lines, fours of a line, outputs, inputs of a four]
    split = whole.view(blocks, OUT, groups, 4, 2, 4).permute(0, 2, 3, 4, 1, 5)
    nibbles = (split[:, :, :, 0] | split[:, :, :, 1] << 4).reshape(blocks, groups, -1)
    steps = torch.stack([scales, middles], -1).view(torch.uint8).view(blocks, OUT, groups, 4).transpose(1, 2)
    return torch.cat([nibbles, steps.reshape(blocks, groups, -1)], -1).view(out, -1)
