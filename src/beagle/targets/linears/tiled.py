"""Linear layers for passes of few tokens, by a CPU kernel of ours (``kernel.cpp``) that reads the weight at full speed.

``beagle compile`` builds the kernel, where the CPU multiplies bf16, and keeps it in the user's cache.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import subprocess
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beagle.files import replacing

OUT, IN = 16, 32  # outputs and inputs of a tile
SOURCE = Path(__file__).with_name("kernel.cpp")
SHIM = (  # how a compiled graph calls it
    "AOTITorchError aoti_torch_cpu_tiled_linear("
    "AtenTensorHandle x, AtenTensorHandle weight, AtenTensorHandle* bias, AtenTensorHandle* y)"
)
SECONDS = 300  # that building it may take

_kernel: Any = None  # the library's function, once it is loaded
_operator = torch.library.Library("beagle", "DEF")  # for tracing: what a graph calls
_operator.define("tiled_linear(Tensor x, Tensor weight, Tensor? bias) -> Tensor")


@torch.library.register_fake("beagle::tiled_linear", lib=_operator)
def _shape(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return x.new_empty(x.shape[0], weight.shape[0])


@torch.library.impl(_operator, "tiled_linear", "CPU")
def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """``x [rows, in]``, bf16, times a weight that ``tiled`` ordered, ``[out, in]``, plus ``bias [out]``: ``[rows, out]``."""
    x = x.contiguous()
    rows, inputs = x.shape
    out = x.new_empty(rows, weight.shape[0])
    _kernel(
        x.data_ptr(),
        weight.data_ptr(),
        0 if bias is None else bias.data_ptr(),
        out.data_ptr(),
        rows,
        inputs,
        weight.shape[0],
    )
    return out


def loaded() -> bool:
    """Whether the kernel is at hand."""
    return _kernel is not None


def c_shims() -> dict[Any, list[str]]:
    """Operators that graphs call without going through Python, for inductor."""
    return {torch.ops.beagle.tiled_linear.default: [SHIM]} if loaded() else {}


@cache
def version() -> str:
    """Another source, PyTorch or instruction set is another library."""
    has = torch.cpu._is_avx512_bf16_supported(), torch.cpu._is_amx_tile_supported()
    return hashlib.sha256(SOURCE.read_bytes() + repr((torch.__version__, has)).encode()).hexdigest()[:16]


def load(folder: Path) -> bool:
    """Load what ``build`` made; False if there is nothing that works here.

    Args:
        folder: of all packages.
    """
    global _kernel
    library = folder / f"kernel-{version()}.so"
    if _kernel is None and library.is_file():
        try:
            # global: compiled graphs find its symbols
            _kernel = ctypes.CDLL(str(library), mode=ctypes.RTLD_GLOBAL).tiled_linear
        except (OSError, AttributeError):
            return False
        _kernel.argtypes = [ctypes.c_void_p] * 4 + [ctypes.c_int64] * 3
        _kernel.restype = None
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
    if not torch.cpu._is_avx512_bf16_supported():
        return "this CPU has no AVX-512 BF16"
    torch_folder = Path(torch.__file__).parent
    compiler = os.environ.get("CXX", "g++")
    options = ["-O3", "-march=native", "-std=c++17", "-shared", "-fPIC", "-fopenmp", f"-I{torch_folder / 'include'}"]
    links = [f"-L{torch_folder / 'lib'}", "-ltorch_cpu"]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / f"kernel-{version()}.so") as partial:
            command = [compiler, *options, str(SOURCE), "-o", str(partial), *links]
            subprocess.run(command, capture_output=True, text=True, timeout=SECONDS, check=True)
    except subprocess.CalledProcessError as error:
        return f"{compiler} fails ({(error.stderr.strip().splitlines() or ['no message'])[0]})"
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"{compiler} can't be run ({error})"
    if not load(folder):
        return "what was built can't be loaded"
    return None if _is_faster() else _remove(folder)


def _remove(folder: Path) -> str:
    global _kernel
    _kernel = None
    (folder / f"kernel-{version()}.so").unlink()
    return "they are as fast here"


def _is_faster() -> bool:
    """Whether the kernel beats PyTorch's own packed product here, for the numbers of vectors that decoding has."""
    weights = [torch.randn(1536, 576).bfloat16() for _ in range(40)]  # more than caches hold
    ordered = [(tiled(weight), torch.ops.mkldnn._reorder_linear_weight(weight, 16)) for weight in weights]
    ours, theirs = [], []
    for vectors in (1, 12):
        x = torch.randn(vectors, 576).bfloat16()
        runs: list[list[float]] = [[], []]
        for _ in range(7):
            began = time.perf_counter()
            for own, _ in ordered:
                product(x, own, None)
            between = time.perf_counter()
            for _, other in ordered:
                torch.ops.mkldnn._linear_pointwise(x, other, None, "none", [], "")
            runs[0].append(between - began)
            runs[1].append(time.perf_counter() - between)
        ours.append(min(runs[0]))
        theirs.append(min(runs[1]))
    return sum(ours) < sum(theirs)


def fits(weight: Tensor) -> bool:
    """Whether the kernel takes a weight ``[out, in]``."""
    return (
        loaded()
        and weight.device.type == "cpu"
        and weight.dtype == torch.bfloat16
        and weight.shape[0] % OUT == 0
        and weight.shape[1] % IN == 0
    )


def tiled(weight: Tensor) -> Tensor:
    """A weight ``[out, in]`` in the kernel's order: ``[out / 16, in / 32]`` tiles ``[16 pairs, 16 outputs, 2]``, same shape."""
    out, inputs = weight.shape
    tiles = weight.detach().view(out // OUT, OUT, inputs // IN, IN // 2, 2).permute(0, 2, 3, 1, 4)
    return tiles.contiguous().view(out, inputs)


def apply(weight: Tensor, bias: Tensor | None) -> Callable[[Tensor], Tensor]:
    """``x [..., in] -> x @ weight.T + bias [..., out]`` of a weight that ``fits``."""
    ordered = tiled(weight)
    return lambda x: product(x.reshape(-1, x.shape[-1]), ordered, bias).view(*x.shape[:-1], -1)


class TiledLinear(nn.Module):
    """Stands in for one ``nn.Linear`` in a graph that is about to be traced."""

    def __init__(self, linear: nn.Linear) -> None:
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.weight = nn.Parameter(tiled(linear.weight), requires_grad=False)
        self.bias = None if linear.bias is None else nn.Parameter(linear.bias.detach(), requires_grad=False)

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = torch.ops.beagle.tiled_linear(
            x.reshape(-1, self.in_features).contiguous(), self.weight, self.bias
        )
        return out.view(*x.shape[:-1], self.out_features)


def tile_linears(module: nn.Module) -> None:
    """Replace every ``nn.Linear`` below ``module`` whose weight fits, in place."""
    for parent in list(module.modules()):
        for name, child in list(parent.named_children()):
            if type(child) is nn.Linear and fits(child.weight):
                setattr(parent, name, TiledLinear(child))
