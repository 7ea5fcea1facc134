"""Whole passes by C++ of ours (``pass.cpp``) for models of the common kind, on CPUs that multiply bf16.

What a compiled graph does in several hundred operators takes one call here. ``beagle compile`` builds the library, once
for all models, and keeps it in the user's cache. A model is of the common kind where its layers are transformers' own of
some families that compute the same: RMS norms, RoPE of whole heads, grouped attention over the whole context, and a
gated MLP with SiLU.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any
from weakref import ref

import torch
from torch import Tensor, nn

from beagle.limits import MAX_TREE_TOKENS
from beagle.targets import aot_cache
from beagle.targets.cache import KVCache
from beagle.targets.family import base_of
from beagle.targets.layers import Layers
from beagle.targets.linears import library, tiled
from beagle.targets.linears.matrix import Matrix, matrix, pointer
from beagle.targets.linears.packed import is_plain, is_untouched
from beagle.targets.plan import Kind, Plan
from beagle.targets.runner import FastRunner

SOURCE = Path(__file__).with_name("pass.cpp")
LAYERS = {"LlamaDecoderLayer", "MistralDecoderLayer", "Qwen2DecoderLayer", "Qwen3DecoderLayer"}
ROPE = {"default", "linear", "llama3", "yarn"}  # whose angles depend on the position alone
NORMS = ("attention_norm", "mlp_norm", "query_norm", "key_norm")
PARTS = ("products", "attention", "others", "waiting")  # of a pass; others: norms, RoPE, activations
SPAN = 1024  # positions whose angles are computed together


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in NORMS] + [
        (name, Matrix) for name in ("query_key_value", "output", "gate", "up", "down")
    ]


class _Model(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "layers", "taps")),
        ("eps", c_double), ("scale", c_double), ("norm", c_void_p), ("tap", POINTER(c_int64)), ("layer", POINTER(_Layer)),
    ]  # fmt: skip


class _Tokens(Structure):
    _fields_ = [
        ("rows", c_int64), ("done", c_int64), ("parents", POINTER(c_int64)), ("embeddings", c_void_p), ("ids", c_void_p),
        ("states", c_void_p), ("cos", c_void_p), ("sin", c_void_p), ("context", c_int64), ("head_size", c_int64),
        ("cache", POINTER(c_void_p)), ("seconds", POINTER(c_double)),
    ]  # fmt: skip


class NativePass:
    """Implements ``FastRunner``: trees behind one sequence; what another runner computes besides is left to it."""

    name = "native"
    remedy = "run with BEAGLE_COMPILED=0, and report it"
    exact = True

    def __init__(self, model: nn.Module, quantize: str | None, state_layers: Sequence[int], run: Any) -> None:
        """
        Args:
            model: one that ``fits``, whose weights are plain still; they are copied.
            run: the library's function.
        """
        base: Any = base_of(model)
        self.others: FastRunner | None = None
        self._embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        self._table = table_of(self._embed)
        self._run, self._rotary = run, base.rotary_emb
        self._angles: tuple[Tensor, Tensor] | None = None
        self._cache: tuple[ref[Tensor], Any] | None = None  # of the last pass: its first tensor, the addresses of all
        self._kept: list[Any] = []  # what the library's structures point to
        self._seconds: Any = None  # where the library adds up its parts
        first = base.layers[0]
        self._layers = (_Layer * len(base.layers))(*(self._layer(layer, quantize) for layer in base.layers))
        self._taps = (c_int64 * max(1, len(state_layers)))(*state_layers)
        hidden = base.norm.weight.shape[0]
        dim, attention = first.self_attn.head_dim, first.self_attn
        self._model = _Model(
            hidden, attention.q_proj.out_features // dim, attention.k_proj.out_features // dim, dim, len(base.layers),
            len(state_layers), base.norm.variance_epsilon, attention.scaling, pointer(base.norm.weight.float(), self._kept),
            self._taps, self._layers,
        )  # fmt: skip
        self._state_size = hidden * (len(state_layers) + 1)

    @property
    def kinds(self) -> frozenset[Kind]:
        own: frozenset[Kind] = frozenset(("tree", "exact"))
        return own if self.others is None else own | self.others.kinds

    def new_cache(self, capacity: int) -> KVCache | None:
        """Any cache will do."""

    def takes(self, plan: Plan) -> bool:
        return self._is_own(plan) or (self.others is not None and self.others.takes(plan))

    def __call__(self, tokens: Tensor, plan: Plan) -> Tensor:
        if not self._is_own(plan):
            assert self.others is not None
            return self.others(tokens, plan)
        assert isinstance(plan.slots, slice)
        assert plan.tree is not None
        embeddings, ids = (self._table, tokens) if self._table is not None else (self._embed(tokens).contiguous(), None)
        states = embeddings.new_empty(*tokens.shape, self._state_size)
        cos, sin = self._rotations(plan)
        nodes, rows = len(plan.tree.parents), tokens.shape[1]
        self._run(
            self._model,
            _Tokens(
                rows, nodes - rows, (c_int64 * nodes)(*plan.tree.parents), embeddings.data_ptr(),
                None if ids is None else ids.data_ptr(), states.data_ptr(), cos.data_ptr(), sin.data_ptr(),
                plan.slots.stop - nodes, plan.layers[0].stride(1), self._addresses(plan.layers), self._seconds,
            ),
        )  # fmt: skip
        return states

    def seconds(self, work: Callable[[], object]) -> dict[str, float]:
        """What the passes of some work spend in each of ``PARTS``, by one thread's clock."""
        self._seconds = seconds = (c_double * len(PARTS))()
        try:
            work()
        finally:
            self._seconds = None
        return dict(zip(PARTS, seconds, strict=True))

    def _is_own(self, plan: Plan) -> bool:
        if plan.kind != "tree" or len(plan.layers[0]) != 1:
            return False
        assert isinstance(plan.slots, slice)
        return plan.slots.stop - plan.slots.start <= MAX_TREE_TOKENS

    def _addresses(self, layers: list[Tensor]) -> Any:
        """Of a cache's tensors, which are asked for once."""
        known = self._cache  # another thread may put its own there
        if known is None or known[0]() is not layers[0]:
            known = self._cache = ref(layers[0]), (c_void_p * len(layers))(*(tensor.data_ptr() for tensor in layers))
        return known[1]

    def _rotations(self, plan: Plan) -> tuple[Tensor, Tensor]:
        """Cosines and sines of the first positions, ``[positions, head_dim]``, at least those that the cache has room for."""
        needed = plan.layers[0].shape[2] + MAX_TREE_TOKENS
        if self._angles is None or len(self._angles[0]) < needed:
            positions = torch.arange(-(-needed // SPAN) * SPAN)[None]
            cos, sin = self._rotary(torch.zeros(1, dtype=torch.bfloat16), positions)
            self._angles = cos[0].contiguous(), sin[0].contiguous()
        return self._angles

    def _layer(self, layer: Any, quantize: str | None) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        norms = (
            layer.input_layernorm, layer.post_attention_layernorm,
            getattr(attention, "q_norm", None), getattr(attention, "k_norm", None),
        )  # fmt: skip
        return _Layer(
            *(None if norm is None else pointer(norm.weight.float(), self._kept) for norm in norms),
            self._matrix(quantize, attention.q_proj, attention.k_proj, attention.v_proj),
            *(self._matrix(quantize, of) for of in (attention.o_proj, mlp.gate_proj, mlp.up_proj, mlp.down_proj)),
        )

    def _matrix(self, quantize: str | None, *linears: nn.Linear) -> Matrix:
        """Of layers that read the same, end to end."""
        biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
        bias = torch.cat(biases) if biases else None
        return matrix(torch.cat([linear.weight for linear in linears]), bias, quantize, self._kept)


def table_of(embed: nn.Module) -> Tensor | None:
    """The bf16 rows ``[vocabulary, hidden]`` that C++ can look up itself; None: the module does more than that."""
    if type(embed) is not nn.Embedding or embed.max_norm is not None or not is_untouched(embed):
        return None
    weight = embed.weight.detach()
    return weight if weight.dtype == torch.bfloat16 and weight.is_contiguous() else None


def row_of(table: Tensor, i: int) -> int:
    """The address of a row ``[hidden]``."""
    address: int = table.data_ptr()
    return address + i * table.stride(0) * table.element_size()


def fits(model: nn.Module) -> bool:
    """Whether the library computes a model's passes: transformers' own layers of the families above, with plain weights."""
    config: Any = model.config
    base: Any = base_of(model)
    layers: Any = getattr(base, "layers", None)
    if model.device.type != "cpu" or tiled.used(model.dtype) is None or not isinstance(layers, nn.ModuleList):  # type: ignore[arg-type]
        return False
    if any(
        type(layer).__name__ not in LAYERS or not type(layer).__module__.startswith("transformers.") for layer in layers
    ):
        return False
    attention: Any = layers[0].self_attn
    linears = [of for layer in layers for of in layer.modules() if isinstance(of, nn.Linear)]
    return bool(
        getattr(base.rotary_emb, "rope_type", "") in ROPE
        and config.hidden_act == "silu"
        and attention.head_dim % 64 == 0
        and all(is_plain(of) and of.in_features % 64 == 0 and of.out_features % 16 == 0 for of in linears)
    )


def suits(layers: Layers) -> bool:
    """Whether a model's layers, as the probe found them, see the whole context and no more."""
    return (
        layers.distinct_windows == [None]
        and all(layers.heads)
        and not any(layers.softcaps)
        and not any(layers.sinks)
        and not (layers.cache or layers.own or layers.recurrent or layers.counted or layers.indices)
    )


def find(folder: Path, model: nn.Module, quantize: str | None, state_layers: Sequence[int] = ()) -> NativePass | None:
    """Passes of a model whose weights are not packed yet; None where there is no library, or it doesn't fit.

    Args:
        folder: of all packages.
    """
    run = library.function(library.path(folder, "pass", SOURCE), "beagle_pass")
    if aot_cache.compiled_disabled() or run is None:
        return None
    run.argtypes, run.restype = [POINTER(_Model), POINTER(_Tokens)], None
    tiled.load(folder)
    return NativePass(model, quantize, state_layers, run) if fits(model) else None


def build(folder: Path) -> str | None:
    """Compile the library for this machine.

    Args:
        folder: of all packages.

    Returns:
        Why there is none; None: it is there.
    """
    return library.build(library.path(folder, "pass", SOURCE), SOURCE)
