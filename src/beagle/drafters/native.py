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
from beagle.limits import MAX_NODES
from beagle.targets import aot_cache
from beagle.targets.linears import library, tiled
from beagle.targets.linears.matrix import Matrix, matrix, pointer
from beagle.targets.linears.tiled import OUT
from beagle.targets.native import row_of, table_of
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
        ("memory", c_void_p),
    ]  # fmt: skip


class _Plan(Structure):
    _fields_ = [
        *((name, c_int64) for name in ("depth", "width", "most")),
        ("least", c_double), ("enough", c_double), ("noise", c_void_p),
    ]  # fmt: skip


class _Found(Structure):
    _fields_ = [("tokens", POINTER(c_int64)), ("parents", POINTER(c_int64)), ("scores", POINTER(c_double))]


class Functions(NamedTuple):
    """Of the library: a draft, and what it keeps of an answer from one draft to the next."""

    draft: Any
    remember: Any
    forget: Any
    own: Any
    disown: Any


class _Memory:
    """What is kept of an answer.

    Attributes:
        library: the library's part of it.
        seen: tokens of the answer that were looked at.
        own: those that the head's vocabulary lacks: names in the prompt, say. A draft may have them, too.
    """

    def __init__(self, library: int) -> None:
        self.library = library
        self.seen = 0
        self.own: list[int] = []


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
        self._memories: WeakKeyDictionary[HeadContext, _Memory] = WeakKeyDictionary()
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
        own = self._memory_of(context).own
        filled = own + own[:1] * (-len(own) % OUT)  # as the library fills its blocks
        return torch.cat([self._draft_vocab, torch.tensor(filled)]) if own else self._draft_vocab

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
        table = self._table
        embedding = table if table is not None else context.embed(torch.tensor([root]))
        context.reserve(context.length + 2 + plan.depth * plan.width)
        cos, sin = context.rotations.up_to(context.length + plan.depth)
        noise = None if noise is None else noise[0].float().contiguous()
        answer = _Answer(
            states.data_ptr(), len(states), unread,
            row_of(embedding, 0 if table is None else root),
            context.cache.data_ptr(), context.cache.shape[2], context.keys, context.length - 1,
            cos.data_ptr(), sin.data_ptr(), self._memory_of(context).library,
        )  # fmt: skip
        most = plan.nodes or MAX_NODES
        tokens, parents, scores = (c_int64 * most)(), (c_int64 * most)(), (c_double * most)()
        shape = _Plan(
            plan.depth, plan.width, most, least_score(min_expected_tokens), min_expected_tokens,
            None if noise is None else noise.data_ptr(),
        )  # fmt: skip
        count = self._functions.draft(self._head, answer, shape, _Found(tokens, parents, scores))
        context.keys += unread
        context.unread = []
        return Draft(tokens[:count], parents[:count], scores[:count])

    def _memory_of(self, context: HeadContext) -> _Memory:
        """As of now, with the newest own tokens if there are many."""
        memory = self._memories.get(context)
        if memory is None:
            memory = self._memories[context] = _Memory(self._functions.remember())
            finalize(context, self._functions.forget, memory.library)
        lacking = [token for token in context.tokens[memory.seen :] if token not in self._drafted]
        if lacking and (fresh := sorted({*lacking} - {*memory.own})):
            own = memory.own + fresh
            if len(own) > MOST_OWN:
                fresh = own = own[-MOST_OWN:]
                memory.own = []
                self._functions.disown(memory.library)
            ids = torch.tensor(fresh)
            rows, biases = self._target.head_rows(ids)
            embeddings = self._target.embed(ids).contiguous()
            pointers = [0 if of is None else of.data_ptr() for of in (ids, rows, biases, embeddings)]
            self._functions.own(memory.library, *pointers, *rows.shape)
            memory.own = own
        memory.seen = len(context.tokens)
        return memory

    def _floats(self, tensor: Tensor | None) -> int | None:
        return None if tensor is None else pointer(tensor.float(), self._kept)

    def _matrix(self, weight: Tensor | None, bias: Tensor | None = None) -> Matrix:
        return Matrix() if weight is None else matrix(weight, bias, "int8", self._kept)


def functions(path: Path) -> Functions | None:
    """What the library does; None where there is none that works here."""
    found = [library.function(path, f"beagle_{name}") for name in Functions._fields]
    if None in found:
        return None
    made = Functions(*found)
    made.draft.argtypes, made.draft.restype = [POINTER(kind) for kind in (_Head, _Answer, _Plan, _Found)], c_int64
    made.remember.argtypes, made.remember.restype = [], c_void_p
    made.own.argtypes, made.own.restype = [c_void_p] * 5 + [c_int64] * 2, None
    for function in (made.forget, made.disown):
        function.argtypes, function.restype = [c_void_p], None
    return made


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
