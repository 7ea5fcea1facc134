"""What every draft head is made of: one attention block of the target's conventions.

A head is a subclass: it says what its block reads and adds to the residual. Slot i is the place that
predicts token t_{i+2} from the state h_i and the token t_{i+1}; query and key of a slot share RoPE
index i. Embeddings and LM head are the target's own, frozen, and no part of a head.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol, Self, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN

from beagle.drafters.norm import RMSNorm

Rotation = tuple[Tensor, Tensor]
Head = TypeVar("Head", bound="Block")


@dataclass(frozen=True)
class BlockConfig:
    """The shape of a block; derived from any target's config by ``for_target``."""

    hidden_size: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    intermediate_size: int
    target_vocab_size: int
    hidden_act: str = "silu"
    norm_eps: float = 1e-6
    rope_theta: float = 10_000.0
    draft_vocab_size: int | None = None  # None: the target's whole vocabulary
    kv_layers: tuple[int, ...] = ()  # of the target, from 1 on: their outputs are read beside its top state

    removed: ClassVar[dict[str, Any]] = {}  # settings that checkpoints may still name, and their only value

    def __post_init__(self) -> None:
        object.__setattr__(self, "kv_layers", tuple(self.kv_layers))  # JSON has lists
        if list(self.kv_layers) != sorted({*self.kv_layers}) or min(self.kv_layers, default=1) < 1:
            raise ValueError(f"kv_layers are ascending numbers of layers from 1 on, not {list(self.kv_layers)}")

    @property
    def state_size(self) -> int:
        """Width of the hidden states that the head is given: outputs of ``kv_layers``, then the top state."""
        return self.hidden_size * (len(self.kv_layers) + 1)

    @property
    def cached_heads(self) -> int:
        """Heads of keys and values that are kept of a slot, those of all its blocks."""
        return self.num_kv_heads

    @classmethod
    def default_kv_layers(cls, count: int) -> tuple[int, ...]:
        """``kv_layers`` of a head whose settings name none, for a target of ``count`` layers."""
        return ()

    @classmethod
    def layers_of(cls, settings: Mapping[str, Any], count: int) -> tuple[int, ...]:
        """The ``kv_layers`` that a head with these settings has; ``auto`` are those at one and two thirds of the depth.

        Args:
            settings: of a recipe's head section.
            count: layers of the target.
        """
        wanted = settings.get("kv_layers", cls.default_kv_layers(count))
        return tuple(sorted({count // 3, 2 * count // 3} - {0}) if wanted == "auto" else wanted)

    @classmethod
    def for_target(cls, target: Any, **overrides: Any) -> Self:
        """The target's own conventions, with as many KV heads as query heads (see the ablation).

        Sizes are those of the loaded weights; what families name differently, or not at all, has a default.
        ``kv_layers`` may be ``auto``, as of ``layers_of``.
        """
        config = target.config
        sizes = zip(target.layers.heads, target.layers.shapes, strict=True)
        attention = [(heads, shape.key_dim) for heads, shape in sizes if heads]  # a convolution has none
        heads, head_dim = (attention or [(max(1, target.hidden_size // 64), min(64, target.hidden_size))])[0]
        if target.ranks.count > 1:  # this rank has some of them
            heads = setting(config, "num_attention_heads") or heads
        rope = setting(config, "rope_parameters") or {}
        rope = rope.get("full_attention") or rope
        act = setting(config, "hidden_act") or setting(config, "hidden_activation")
        inner = setting(config, "intermediate_size")  # some families have one for each layer
        settings: dict[str, Any] = {
            "hidden_size": target.hidden_size,
            "num_heads": heads,
            "num_kv_heads": heads,
            "head_dim": head_dim + head_dim % 2,  # RoPE turns pairs
            "intermediate_size": inner if isinstance(inner, int) else 4 * target.hidden_size,
            "target_vocab_size": target.vocab_size,
            "hidden_act": act if act in ACT2FN else "silu",
            "norm_eps": float(setting(config, "rms_norm_eps") or 1e-6),
            "rope_theta": float(rope.get("rope_theta") or 10_000.0),
        }
        return cls(**{**settings, **overrides, "kv_layers": cls.layers_of(overrides, target.layer_count)})


def setting(config: Any, name: str) -> Any:
    """What a config says, None where it doesn't, or says it for each layer apart."""
    try:
        return getattr(config, name, None)
    except RuntimeError:
        return None


class LevelView(Protocol):
    """What the nodes of one level of growing trees see.

    Attributes:
        level: the root's is 1.
    """

    level: int

    def rotation(self) -> Rotation:
        """RoPE of the one slot at which all nodes of a context's level stand, ``[contexts, 1, 1, head_dim]``."""

    def append(self, k: Tensor, v: Tensor) -> None:
        """Add a key and value of each node, ``[contexts, cached_heads, beam, head_dim]``, that only it sees among its
        level, and later its descendants."""

    def attend(self, q: Tensor, heads: slice) -> Tensor:
        """Attention of ``q [contexts, heads, beam, head_dim]`` over all that each node sees.

        Args:
            q: queries.
            heads: which of the cached heads they meet.
        """


HEADS: dict[str, type[Block]] = {}  # by architecture


def register(architecture: str) -> Callable[[type[Head]], type[Head]]:
    """Make a head known by the name of its architecture, which recipes and checkpoints use."""

    def add(head: type[Head]) -> type[Head]:
        head.architecture = architecture
        HEADS[architecture] = head
        return head

    return add


class Layer(nn.Module):
    """Projections, attention and MLP.

    Attributes:
        dropout: while training, of attention's output and the MLP's middle.
        part: of a batch that is computed in parts, which samples these are, of how many; None: it is computed at once.
            What is dropped does not depend on it.
    """

    config: BlockConfig

    def __init__(self, config: BlockConfig) -> None:
        super().__init__()
        self.config = config
        self.dropout = 0.0
        self.part: tuple[slice, int] | None = None

    def _add_attention(self, width: int | None = None) -> None:
        """
        Args:
            width: of what queries, keys and values are made of; None: of a hidden state.
        """
        c = self.config
        width = width or c.hidden_size
        self.q_proj = nn.Linear(width, c.num_heads * c.head_dim, bias=False)
        self.k_proj = nn.Linear(width, c.num_kv_heads * c.head_dim, bias=False)
        self.v_proj = nn.Linear(width, c.num_kv_heads * c.head_dim, bias=False)
        self.o_proj = nn.Linear(c.num_heads * c.head_dim, c.hidden_size, bias=False)

    def _add_mlp(self) -> None:
        c = self.config
        self.mlp_norm = RMSNorm(c.hidden_size, c.norm_eps)
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)
        self.activation = ACT2FN[c.hidden_act]

    def _initialise(self) -> None:
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)

    def queries(self, x: Tensor, rotation: Rotation) -> Tensor:
        """``[..., n, hidden]`` -> ``[..., heads, n, head_dim]``."""
        q = self.q_proj(x)
        return rotate(q.unflatten(-1, (self.config.num_heads, -1)).transpose(-3, -2), rotation)

    def keys_values(self, x: Tensor, rotation: Rotation) -> tuple[Tensor, Tensor]:
        """``[..., n, hidden]`` -> two of ``[..., kv_heads, n, head_dim]``."""
        x = for_products(x)
        k = self.k_proj(x).unflatten(-1, (self.config.num_kv_heads, -1)).transpose(-3, -2)
        v = self.v_proj(x).unflatten(-1, (self.config.num_kv_heads, -1)).transpose(-3, -2)
        return rotate(k, rotation), v

    def attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None) -> Tensor:
        """Softmax attention; mask additive, broadcast to ``[..., heads, queries, keys]``."""
        shared = self.config.num_heads != self.config.num_kv_heads
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, enable_gqa=shared)

    def _output(self, attended: Tensor) -> Tensor:
        """``[..., heads, n, head_dim]`` -> ``[..., n, hidden]``."""
        return self.o_proj(self._drop(attended.transpose(-3, -2).flatten(-2)))

    def _feed_forward(self, y: Tensor, x: Tensor) -> Tensor:
        """MLP(x) + y, both ``[..., n, hidden]``."""
        x = for_products(x)
        return y + self.down_proj(self._drop(self.activation(self.gate_proj(x)) * self.up_proj(x)))

    def _drop(self, x: Tensor) -> Tensor:
        if not (self.dropout and self.training):
            return x
        if self.part is not None:
            samples, of = self.part
            return x * self._dropped(x.new_ones(of, *x.shape[1:]))[samples]
        return self._dropped(x)

    def _dropped(self, x: Tensor) -> Tensor:
        return drop(x, self.dropout) if x.device.type == "cpu" else F.dropout(x, self.dropout)


class Block(Layer, ABC):
    """A draft head: one layer or more, and the draft vocabulary.

    Attributes:
        architecture: the name that recipes and checkpoints use, see ``register``.
        config_class: its config.
        draft_vocab: ``[draft_vocab]`` draft id -> target id.
    """

    architecture: ClassVar[str]
    config_class: ClassVar[type[BlockConfig]]
    draft_vocab: Tensor

    def __init__(self, config: BlockConfig) -> None:
        super().__init__(config)
        size = config.draft_vocab_size or config.target_vocab_size
        self.register_buffer("draft_vocab", torch.arange(size))

    @abstractmethod
    def known(self, tokens: list[int], states: Tensor, newest: Tensor) -> tuple[list[int], Tensor]:
        """What the next slots are made of, now that the target has run ``tokens``, too.

        Args:
            tokens: of the answer.
            states: their hidden states ``[n, state_size]``.
            newest: the state before them, ``[1, state_size]``; ``[0, state_size]`` before the prompt.

        Returns:
            A token and a state ``[m, state_size]`` for each slot that can be written.
        """

    @abstractmethod
    def remember(
        self, tokens: Tensor, states: Tensor, rotation: Rotation, embed: Callable[[Tensor], Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Keys and values of such slots, of several contexts end to end.

        Args:
            tokens: ``[m]``.
            states: ``[m, state_size]``.
            rotation: RoPE of the slots.
            embed: the target's embeddings, ``[m]`` -> ``[m, hidden]``.

        Returns:
            Two of ``[cached_heads, m, head_dim]``.
        """

    @abstractmethod
    def level(self, seen: LevelView, embeddings: Tensor, newest: Tensor) -> Tensor:
        """One level of growing trees.

        Args:
            seen: what the nodes see, and where their keys are added.
            embeddings: of the nodes, ``[contexts, beam, hidden]``.
            newest: the state before each, at the root the target's own ``[contexts, 1, state_size]``, below it a
                predicted one ``[contexts, beam, hidden]``.

        Returns:
            Predicted states ``[contexts, beam, hidden]``.
        """

    def _add_fusion(self) -> None:
        """What ``fuse`` needs, where there is more to read than the top state."""
        c = self.config
        if c.kv_layers:
            self.layer_norms = nn.ModuleList(RMSNorm(c.hidden_size, c.norm_eps) for _ in c.kv_layers)
            self.layer_proj = nn.Linear(len(c.kv_layers) * c.hidden_size, c.hidden_size, bias=False)

    def fuse(self, states: Tensor) -> Tensor:
        """The target's states as the head reads them: the top state, and what it takes from other layers.

        A predicted state stands in for the sum.

        Args:
            states: ``[..., state_size]``.

        Returns:
            ``[..., hidden]``.
        """
        if not self.config.kv_layers:
            return states
        *parts, top = states.split(self.config.hidden_size, dim=-1)
        normed = [norm(part) for norm, part in zip(self.layer_norms, parts, strict=True)]
        return top + self.layer_proj(torch.cat(normed, dim=-1)).to(top.dtype)

    def rotation(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """RoPE of ``positions [..., n]``: cosines and sines, ``[..., 1, n, head_dim]``.

        In fp32 throughout: rounded frequencies, as a buffer of the head would have, are far off at distant positions.
        """
        steps = torch.arange(0, self.config.head_dim, 2, device=positions.device) / self.config.head_dim
        angle = positions[..., None, :, None].float() * self.config.rope_theta**-steps
        angle = torch.cat([angle, angle], dim=-1)
        return angle.cos().to(dtype), angle.sin().to(dtype)


class Rotations:
    """``Block.rotation`` of slots, looked up: a draft asks for few, and computing them takes a dozen small operations."""

    def __init__(self, head: Block, dtype: torch.dtype, device: torch.device) -> None:
        self._head, self.dtype, self.device = head, dtype, device
        self._known: Rotation | None = None

    def __call__(self, slots: Tensor, end: int) -> Rotation:
        """Of ``slots [..., n]``, all below ``end``: cosines and sines, ``[..., 1, n, head_dim]``."""
        cos, sin = (of[slots].unsqueeze(-3) for of in self.up_to(end))
        return cos, sin

    def span(self, begin: int, end: int) -> Rotation:
        """Of the slots from ``begin`` to before ``end``: views, ``[1, n, head_dim]``."""
        cos, sin = self.up_to(end)
        return cos[None, begin:end], sin[None, begin:end]

    def up_to(self, end: int) -> Rotation:
        """Of the first slots, at least ``end`` of them: ``[slots, head_dim]``."""
        known = self._known
        if known is None or len(known[0]) < end:
            size = max(512, 2 * end)
            cos, sin = self._head.rotation(torch.arange(size, device=self.device), self.dtype)
            known = self._known = cos[0], sin[0]
        return known


def for_products(x: Tensor) -> Tensor:
    """What goes into several products: autocast would make a copy for each of them, which autograd keeps."""
    kind = x.device.type
    return x.to(torch.get_autocast_dtype(kind)) if torch.is_autocast_enabled(kind) else x


def drop(x: Tensor, p: float) -> Tensor:
    """Dropout for CPUs: a random byte for an element, eight of them drawn at once.

    PyTorch's own draws a number for each, one after another.

    Args:
        x: any shape and dtype.
        p: share that becomes 0, in [0, 1), rounded to 1/256; what stays is scaled to the mean.
    """
    kept = max(1, round(256 * (1 - p)))
    drawn = torch.empty(-(-x.numel() // 8), dtype=torch.int64, device=x.device).random_(-(2**63), None)
    return x * (drawn.view(torch.uint8)[: x.numel()].view(x.shape) < kept) * (256 / kept)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Apply RoPE to ``[..., heads, n, head_dim]``."""
    cos, sin = rotation
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat([-b, a], dim=-1) * sin
