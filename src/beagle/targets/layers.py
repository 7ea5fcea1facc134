"""What a model's layers cache and see, and the file that remembers it from load to load."""

from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import transformers
from torch import nn

from beagle.files import write_json
from beagle.hf import own_attention
from beagle.targets.attention import NAME, WINDOW
from beagle.targets.cache import LayerShape
from beagle.targets.counting import give_positions
from beagle.targets.indexed import wrap as wrap_index
from beagle.targets.own_attention import OWN
from beagle.targets.plan import Biased, Chunk, Window, heads_of
from beagle.targets.plan_cache import ASKED
from beagle.targets.recurrent import wrap

FORMAT = 10  # of what is remembered


@dataclass(frozen=True)
class Layers:
    """A model's layers that cache something, in their order: attention, and short convolutions, which cache their inputs.

    Attributes:
        names: of the attention modules below the model without its LM head; empty for a convolution.
        shapes: what each caches.
        heads: query heads of each; 0 for a convolution.
        windows: what each sees.
        softcaps: soft cap of each layer's scores, None for none.
        sinks: whether each layer has attention sinks.
        cache: under which name the layers take a cache that they ask for more than keys; empty: they don't.
        own: whether the modules compute their attention themselves (``targets.own_attention``).
        unscaled: whether the model's logits leave out the scale and the soft cap of its config.
        recurrent: names of the modules that keep a recurrent state, below the model without its LM head.
        one_by_one: whether they take one token at a time behind a state.
        counted: whether position embeddings count from the cache's length (``targets.counting``).
        indices: names of the modules that choose keys by small ones, with the width of these.
    """

    names: list[str]
    shapes: list[LayerShape]
    heads: list[int]
    windows: list[Window]
    softcaps: list[float | None]
    sinks: list[bool]
    cache: str = ""
    unscaled: bool = False
    own: bool = False
    recurrent: list[str] = field(default_factory=list)
    one_by_one: bool = False
    counted: bool = False
    indices: dict[str, int] = field(default_factory=dict)

    @property
    def are_plain(self) -> bool:
        """Whether causal attention to the whole context is all there is, so that a prompt needs no mask."""
        return not self.need_scores and self.distinct_windows == [None]

    @property
    def need_scores(self) -> bool:
        """Whether some layer needs a mask, since it changes its scores, by a soft cap or by sinks, or chooses its keys."""
        return any(cap is not None for cap in self.softcaps) or any(self.sinks) or bool(self.indices)

    @property
    def cached(self) -> list[LayerShape]:
        """What a cache holds: ``shapes``, and the small keys of each index behind them."""
        return [*self.shapes, *(LayerShape(1, width, 0) for width in self.indices.values())]

    @property
    def mask_heads(self) -> int:
        """Heads of the widest mask."""
        return max(map(heads_of, self.windows), default=1)

    @cached_property
    def distinct_windows(self) -> list[Window]:
        """Each window once, in the order of the layers."""
        return list(dict.fromkeys(self.windows))

    def slot_bytes(self, dtype: torch.dtype) -> int:
        """Bytes of one token's keys, values and small keys in the cache, all layers."""
        return sum(c.kv_heads * (c.key_dim + c.value_dim) for c in self.cached) * dtype.itemsize

    def slot_operations(self) -> int:
        """Operations of attention for one token and one key, all layers."""
        return sum(2 * heads * (c.key_dim + c.value_dim) for heads, c in zip(self.heads, self.shapes, strict=True))

    def mark(self, base: nn.Module) -> None:
        """Leave each layer's window on its module, where our attention function reads it; and ``cache`` on all.

        Modules with a recurrent state run chains from now on.
        """
        modules = dict(base.named_modules())
        for name, window in zip(self.names, self.windows, strict=True):
            if name:
                setattr(modules[name], WINDOW, window)
        for number, name in enumerate(self.recurrent):
            wrap(modules[name], number, self.one_by_one)
        for number, name in enumerate(self.indices):
            wrap_index(modules[name], len(self.shapes) + number)
        if self.counted:
            give_positions(base)
        setattr(base, ASKED, self.cache)
        setattr(base, OWN, self.windows if self.own else None)


def remembered(folder: Path, key: str) -> Layers | None:
    """What ``remember`` stored under ``key``; None: nothing, or nothing that can be read."""
    try:
        found = json.loads((folder / f"{key}.json").read_text(encoding="utf-8"))
        shapes = [LayerShape(**shape) for shape in found.pop("shapes")]
        windows = [_window(seen) for seen in found.pop("windows")]
        return Layers(shapes=shapes, windows=windows, **found)
    except (OSError, ValueError, TypeError, KeyError, AttributeError):
        return None


def _window(seen: Any) -> Window:
    """A window as JSON has it."""
    if not isinstance(seen, dict):
        return None if seen is None else int(seen)
    return Chunk(**seen) if "size" in seen else Biased(tuple(seen.pop("slopes")), **seen)


def remember(folder: Path, key: str, layers: Layers) -> None:
    """Store what a probe has found, so that the next load of the same model is spared it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        write_json(folder / f"{key}.json", asdict(layers))
    except OSError:
        return  # no room: the next load probes again


def key_of(model: Any, digest: str, quantize: str | None) -> str:
    """A name for everything that a probe's outcome depends on."""
    settings = {k: v for k, v in model.config.to_dict().items() if not k.startswith("_")}
    about = [
        FORMAT, transformers.__version__, torch.__version__,
        f"{type(model).__module__}.{type(model).__qualname__}",  # of code from a hub, with its revision
        settings, digest, quantize,
        str(model.dtype), str(model.device.type), own_attention(model, NAME),
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(about, sort_keys=True, default=str).encode()).hexdigest()[:24]
