"""The target's pass as one compiled graph, made once by ``beagle compile`` and kept in the user's cache.

Eager layers spend a third of a small pass between their products: norms, RoPE, masks and the interpreter that
calls them. AOTInductor turns the whole pass, for any number of rows up to ``MOST_ROWS`` and of keys, into one
library without Python, guards or tracing at load. The cache's tensors are inputs that it writes in place.

Weights are part of the package, in the order that its products read them, so they lie in memory twice: the eager
pass, which prompts, batches and exact mode take, has its own.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.targets.attention import FOLDED, NAME, Pass, ShapeProbe, current_pass
from beagle.targets.cache import KVCache, LayerShape
from beagle.targets.quantize import quantize_linears

MOST_ROWS = FOLDED  # of a compiled pass: a tree with its root
FORMAT = 1  # of a package; another one is another key
OPTIONS = {"freezing": True}  # weights become constants, packed for the products


class _TracedPass(Pass):
    """A pass whose places and masks are inputs of a graph."""

    def __init__(self, caches: list[Tensor], slots: Tensor, masks: dict[int | None, Tensor]) -> None:
        self._keys, self._values = caches[0::2], caches[1::2]
        self._at = slots
        self._masks = masks
        self._folded_masks = {}
        self.layers_seen = 0

    def write(self, layer: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        self.layers_seen += 1
        keys, values = self._keys[layer], self._values[layer]
        keys[:, :, self._at] = key
        values[:, :, self._at] = value
        end = next(iter(self._masks.values())).shape[-1]
        return keys[:, :, :end], values[:, :, :end]


class _Graph(nn.Module):
    """What is compiled: ``(embeddings, positions, slots, masks, caches) -> states``."""

    def __init__(self, base: nn.Module, windows: list[int | None]) -> None:
        super().__init__()
        self.base = base
        self._windows = windows

    def forward(
        self, embeddings: Tensor, positions: Tensor, slots: Tensor, masks: list[Tensor], caches: list[Tensor]
    ) -> Tensor:
        token = current_pass.set(_TracedPass(caches, slots, dict(zip(self._windows, masks, strict=True))))
        try:
            states: Tensor = self.base(inputs_embeds=embeddings, position_ids=positions, use_cache=False)[0]
            return states
        finally:
            current_pass.reset(token)


class CompiledPass:
    """A loaded package.

    Attributes:
        windows: sliding windows of the target's layers (None: the whole context), in the order of the graph's masks.
    """

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            BeagleError: the package can't be read.
        """
        try:
            about = json.loads((folder / "about.json").read_text(encoding="utf-8"))
            self.windows: list[int | None] = about["windows"]
            self._run = torch._inductor.aoti_load_package(str(folder / "pass.pt2"))
        except (OSError, ValueError, KeyError, RuntimeError) as error:
            raise BeagleError(f"the compiled pass in {folder} can't be read; delete the folder") from error

    def __call__(self, embeddings: Tensor, plan: Pass) -> Tensor:
        """``[1, rows, hidden]``, embeddings to states; fresh keys and values are written where ``plan`` says."""
        assert isinstance(plan.slots, slice)
        slots = torch.arange(plan.slots.start, plan.slots.stop)
        masks = [plan.mask(window, embeddings.dtype) for window in self.windows]
        states: Tensor = self._run(embeddings, plan.query_positions, slots, masks, plan.cache.tensors)
        return states


def find(folder: Path, model: nn.Module, quantize: str | None) -> CompiledPass | None:
    """The pass that ``build`` made of this very model, before its weights are packed; None if there is none.

    ``BEAGLE_COMPILED=0`` finds nothing.
    """
    if (
        os.environ.get("BEAGLE_COMPILED") == "0"
        or model.device.type != "cpu"
        or not any(folder.glob(f"{_kind(model, quantize)}-*"))
    ):
        return None
    place = _place(folder, model, quantize)
    return CompiledPass(place) if place.is_dir() else None


@torch.no_grad()
def build(folder: Path, model: nn.Module, name: str, quantize: str | None) -> tuple[Path, float]:
    """Compile a freshly loaded model's pass; the model is of no use afterwards.

    Args:
        folder: of all packages. name: of the target, for errors.
    Returns:
        The package's folder and the seconds it took.
    Raises:
        BeagleError: the model can't be traced, or there is no compiler, or no room.
    """
    began = time.perf_counter()
    place = _place(folder, model, quantize)
    model.set_attn_implementation(NAME)  # type: ignore[operator]
    model.eval().requires_grad_(False)
    base: nn.Module = model.base_model  # type: ignore[assignment]
    embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
    layers, windows = _probe(base)
    if quantize:
        quantize_linears(base, quantize)
    folder.mkdir(parents=True, exist_ok=True)
    partial = Path(tempfile.mkdtemp(dir=folder, prefix="."))
    try:
        _export(_Graph(base, windows), embed, layers, partial / "pass.pt2", name)
        seconds = time.perf_counter() - began
        write_json(partial / "about.json", {"target": name, "windows": windows, "seconds": round(seconds, 1)})
        shutil.rmtree(place, ignore_errors=True)
        partial.rename(place)
    except OSError as error:
        raise BeagleError(f"cannot write {place}: {error.strerror}; free space or set BEAGLE_CACHE") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return place, seconds


def _export(graph: _Graph, embed: nn.Module, layers: list[LayerShape], package: Path, name: str) -> None:
    weight: Tensor = embed.weight  # type: ignore[assignment]
    rows, context = 6, 10
    whole = KVCache(layers, batch=1, capacity=32, dtype=weight.dtype, device=weight.device)
    caches = [tensor.clone() for tensor in whole.tensors]  # parts of one tensor take minutes to be proven apart
    positions = torch.arange(context, context + rows)[None]
    masks = [torch.zeros(1, 1, rows, context + rows, dtype=weight.dtype) for _ in graph._windows]
    auto = torch.export.Dim.AUTO
    shapes = ({1: auto}, {1: auto}, {0: auto}, [{2: auto, 3: auto} for _ in masks], [{2: auto} for _ in caches])
    example = embed(torch.ones(1, rows, dtype=torch.long))
    try:
        traced = torch.export.export(
            graph, (example, positions, positions[0], masks, caches), dynamic_shapes=shapes, strict=False
        )
        torch._inductor.aoti_compile_and_package(traced, package_path=str(package), inductor_configs=dict(OPTIONS))
    except OSError:
        raise
    except Exception as error:  # tracing and compiling raise whatever they stumble over
        reason = (str(error).strip().splitlines() or [""])[0]
        raise BeagleError(
            f"{name}: its pass can't be compiled here ({type(error).__name__}: {reason}); without it everything works "
            "as before (a C++ compiler is needed: g++ or clang)"
        ) from error


def _probe(base: nn.Module) -> tuple[list[LayerShape], list[int | None]]:
    """What each layer caches, and the sliding windows there are."""
    probe = ShapeProbe()
    token = current_pass.set(probe)
    try:
        device = next(base.parameters()).device
        base(input_ids=torch.ones(1, 2, dtype=torch.long, device=device), use_cache=False)
    finally:
        current_pass.reset(token)
    return [probe.layers[i] for i in sorted(probe.layers)], list(probe.windows)


def _place(folder: Path, model: nn.Module, quantize: str | None) -> Path:
    """Where a model's package is: named by what it is and by every weight."""
    digest = hashlib.sha256()
    for name, tensor in sorted(model.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().contiguous().flatten().view(torch.uint8).numpy())
    return folder / f"{_kind(model, quantize)}-{digest.hexdigest()[:16]}"


def _kind(model: nn.Module, quantize: str | None) -> str:
    """All that makes a package useless elsewhere but the weights; little to compute."""
    config: Any = model.config
    settings = {k: v for k, v in config.to_dict().items() if not k.startswith("_")}
    about = [
        FORMAT, type(model).__name__, settings, str(next(model.parameters()).dtype), quantize, torch.__version__,
        torch.get_num_threads(), torch.backends.cpu.get_cpu_capability(), sorted(OPTIONS.items()),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:16]
