"""A whole draft of one context by C++ of ours (``draft.cpp``), for Beagle heads on CPUs that multiply bf16.

What ``compiled`` does with a graph a level takes one call here: the threads start once a draft, and no small tensors are
made. ``beagle compile`` builds the library, once for all heads, and keeps it in the user's cache.
"""

from __future__ import annotations

from ctypes import POINTER, Structure, c_double, c_int64, c_void_p
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakKeyDictionary, finalize

import torch
from torch import Tensor

from beagle.drafters.base import Draft, TreePlan
from beagle.drafters.block import Block
from beagle.drafters.context import HeadContext, write_unread
from beagle.drafters.grow import least_score
from beagle.drafters.head import BeagleHead, FurtherBlock
from beagle.targets import aot_cache
from beagle.targets.linears import library, tiled
from beagle.targets.linears.matrix import Matrix, matrix, pointer
from beagle.targets.native import table_of
from beagle.targets.target import Target

SOURCE = Path(__file__).with_name("draft.cpp")
MOST_OWN = 256  # tokens of an answer beside those of the head
MOST_UNREAD = 64  # slots whose keys are written on the way; large products make more at once


class _Layer(Structure):
    _fields_ = [(name, c_void_p) for name in ("query_norm", "state_norm", "mlp_norm")] + [
        (name, Matrix) for name in ("query", "key_value", "output", "gate", "up", "down")
    ]


class _Head(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("hidden", "heads", "kv_heads", "head_dim", "blocks", "layers", "tokens")),
        ("eps", c_double), ("newest", c_void_p), ("token", c_void_p), ("layer_norms", c_void_p), ("layer_proj", Matrix),
        ("block", POINTER(_Layer)), ("lm_head", Matrix), ("embeddings", c_void_p), ("ids", c_void_p),
    ]  # fmt: skip


class _Answer(Structure):
    _fields_ = [
        ("states", c_void_p), ("rows", c_int64), ("unread", c_int64), ("root", c_void_p), ("cache", c_void_p),
        ("capacity", c_int64), ("keys", c_int64), ("slot", c_int64), ("cos", c_void_p), ("sin", c_void_p),
        ("ordered", c_void_p), ("lm_head", Matrix), ("embeddings", c_void_p), ("ids", c_void_p),
    ]  # fmt: skip


class _Plan(Structure):
    _fields_ = [("depth", c_int64), ("width", c_int64), ("least", c_double), ("enough", c_double), ("noise", c_void_p)]


class _Found(Structure):
    _fields_ = [("tokens", POINTER(c_int64)), ("parents", POINTER(c_int64)), ("scores", POINTER(c_double))]


class Functions(NamedTuple):
    """Of the library: a draft, and memory of an answer's keys from one draft to the next."""

    draft: Any
    remember: Any
    forget: Any


class _Own:
    """Tokens of one answer that its head's vocabulary lacks: names in the prompt, say. A draft may have them, too.

    Attributes:
        ids: theirs, in multiples of 16, int64; those that fill up have a logit of minus infinity.
        matrix: LM head.
        embeddings: bf16 ``[tokens, hidden]``.
    """

    def __init__(self) -> None:
        self.seen = 0  # tokens of the answer
        self.tokens: list[int] = []
        self.ids = torch.zeros(0, dtype=torch.int64)
        self.embeddings = torch.zeros(0)
        self.matrix = Matrix()
        self.kept: list[Tensor] = []  # what the matrix points to


class NativeDraft:
    """Implements ``WholeDrafts``: one head's weights as the library reads them."""

    def __init__(self, target: Target, head: BeagleHead, functions: Functions) -> None:
        """
        Args:
            target: that the head drafts for.
            head: one that ``fits``; its weights are copied.
            functions: of the library.
        """
        c = head.config
        self._functions, self._target, self._draft_vocab = functions, target, head.draft_vocab
        self._table = table_of(target.embed)
        self._drafted = frozenset(head.draft_vocab.tolist())
        self._own: WeakKeyDictionary[HeadContext, _Own] = WeakKeyDictionary()
        self._ordered: WeakKeyDictionary[HeadContext, int] = WeakKeyDictionary()  # the library's memory of each answer
        self._kept: list[Any] = []  # what the library's structures point to
        blocks: list[BeagleHead | FurtherBlock] = [head, *(b for b in head.further if isinstance(b, FurtherBlock))]
        layers = [
            _Layer(
                self._floats(
                    block.query_norm.weight if isinstance(block, FurtherBlock) else head.embedding_norm.weight
                ),
                self._floats(block.state_norm.weight),
                self._floats(block.mlp_norm.weight),
                self._matrix(block.q_proj.weight),
                self._matrix(torch.cat([block.k_proj.weight, block.v_proj.weight])),
                *(
                    self._matrix(linear.weight)
                    for linear in (block.o_proj, block.gate_proj, block.up_proj, block.down_proj)
                ),
            )
            for block in blocks
        ]
        array = (_Layer * len(layers))(*layers)
        self._kept.append(array)
        weight, bias = target.head_rows(head.draft_vocab)
        self._head = _Head(
            c.hidden_size, c.num_heads, c.num_kv_heads, c.head_dim, c.blocks, len(c.kv_layers), len(head.draft_vocab), c.norm_eps,
            self._floats(head.newest if c.newest_state == "scale" else None),
            self._floats(head.token if c.token_in_mlp else None),
            self._floats(torch.cat([*head.layer_norms.parameters()]) if c.kv_layers else None),
            self._matrix(head.layer_proj.weight if c.kv_layers else None),
            array,
            self._matrix(weight, bias),
            pointer(target.embed(head.draft_vocab), self._kept),
            pointer(head.draft_vocab, self._kept),
        )  # fmt: skip

    def vocabulary(self, context: HeadContext) -> Tensor:
        own = self._own_tokens(context)
        return torch.cat([self._draft_vocab, own.ids]) if own.tokens else self._draft_vocab

    def __call__(
        self,
        context: HeadContext,
        root: int,
        plan: TreePlan,
        min_expected_tokens: float = 0.0,
        noise: Tensor | None = None,
    ) -> Draft | None:
        if plan.kind == "static":
            return None
        if sum(len(tokens) for tokens, _ in context.unread) > MOST_UNREAD:
            write_unread([context])
        unread = sum(len(tokens) for tokens, _ in context.unread)
        pieces = [state for _, state in context.unread] if unread else [context.newest]
        states = pieces[0].contiguous() if len(pieces) == 1 else torch.cat(pieces)
        embedding = context.embed(torch.tensor([root]))[0] if self._table is None else self._table[root]
        width = plan.width
        context.reserve(context.length + 2 + plan.depth * width)
        cos, sin = context.rotations.up_to(context.length + plan.depth)
        noise = None if noise is None else noise[0].float().contiguous()
        own = self._own_tokens(context)
        answer = _Answer(
            states.data_ptr(), len(states), unread, embedding.data_ptr(), context.cache.data_ptr(),
            context.cache.shape[2], context.keys, context.length - 1, cos.data_ptr(), sin.data_ptr(),
            self._ordered_of(context), own.matrix, own.embeddings.data_ptr(), own.ids.data_ptr(),
        )  # fmt: skip
        most = width + (plan.depth - 1) * width * width
        tokens, parents, scores = (c_int64 * most)(), (c_int64 * most)(), (c_double * most)()
        shape = _Plan(
            plan.depth, width, least_score(min_expected_tokens), min_expected_tokens,
            None if noise is None else noise.data_ptr(),
        )  # fmt: skip
        count = self._functions.draft(self._head, answer, shape, _Found(tokens, parents, scores))
        context.keys += unread
        context.unread = []
        return Draft(tokens[:count], parents[:count], scores[:count])

    def _ordered_of(self, context: HeadContext) -> int:
        found = self._ordered.get(context)
        if found is None:
            found = self._ordered[context] = self._functions.remember()
            finalize(context, self._functions.forget, found)
        return found

    def _own_tokens(self, context: HeadContext) -> _Own:
        """The answer's own tokens as of now, the newest of them if there are many."""
        own = self._own.get(context)
        if own is None:
            own = self._own[context] = _Own()
        new = [token for token in context.tokens[own.seen :] if token not in self._drafted]
        own.seen = len(context.tokens)
        if new and (fresh := {*new} - {*own.tokens}):
            own.tokens = (own.tokens + sorted(fresh))[-MOST_OWN:]
            filling = -len(own.tokens) % 16
            own.ids = torch.tensor(own.tokens + own.tokens[:1] * filling)
            weight, bias = self._target.head_rows(own.ids)
            bias = weight.new_zeros(len(weight)) if bias is None else bias.clone()
            bias[len(own.tokens) :] = -torch.inf
            own.kept = []
            own.matrix = matrix(weight, bias, "int8", own.kept)
            own.embeddings = self._target.embed(own.ids).contiguous()
        return own

    def _floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else pointer(tensor.float(), self._kept)

    def _matrix(self, weight: Tensor | None, bias: Tensor | None = None) -> Matrix:
        return Matrix() if weight is None else matrix(weight, bias, "int8", self._kept)


def functions(path: Path) -> Functions | None:
    """What the library does; None where there is none that works here."""
    draft, remember, forget = (library.function(path, f"beagle_{name}") for name in Functions._fields)
    if draft is None or remember is None or forget is None:
        return None
    draft.argtypes, draft.restype = [POINTER(kind) for kind in (_Head, _Answer, _Plan, _Found)], c_int64
    remember.argtypes, remember.restype = [], c_void_p
    forget.argtypes, forget.restype = [c_void_p], None
    return Functions(draft, remember, forget)


def fits(target: Target, head: Block) -> bool:
    """Whether the library computes such a head, and products in bf16 are wanted and at hand here."""
    c = head.config
    return (
        type(head) is BeagleHead  # ablations compute other things
        and target.device.type == "cpu"
        and tiled.used(target.dtype) is not None
        and c.hidden_act == "silu"
        and c.head_dim % 64 == 0
        and c.num_heads % c.num_kv_heads == 0
        and all(of % 64 == 0 for of in (c.hidden_size, c.intermediate_size, c.num_heads * c.head_dim))
        and c.draft_vocab_size is not None  # the embeddings of its tokens are copied
        and c.draft_vocab_size % 16 == 0
    )


def find(folder: Path, target: Target, head: Block) -> NativeDraft | None:
    """Drafts of a head whose weights are not packed yet; None where there is no library, or it doesn't fit.

    Args:
        folder: of all packages.
    """
    if aot_cache.compiled_disabled() or not fits(target, head):
        return None
    found = functions(library.path(folder, "draft", SOURCE))
    if found is None:
        return None
    assert isinstance(head, BeagleHead)
    return NativeDraft(target, head, found)


def build(folder: Path) -> str | None:
    """Compile the library for this machine.

    Args:
        folder: of all packages.

    Returns:
        Why there is none; None: it is there.
    """
    return library.build(library.path(folder, "draft", SOURCE), SOURCE)
