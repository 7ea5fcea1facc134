"""The passes of a wrapped model: caches, prompts, single tokens and trees; who computes them is chosen here."""

from __future__ import annotations

import math
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.limits import MAX_TREE_TOKENS
from beagle.targets.cache import KVCache
from beagle.targets.layers import Layers
from beagle.targets.plan import KEY_BLOCK, Kind, Plan, of_prompt, of_tree, of_trees
from beagle.targets.recurrent_cache import RecurrentCache
from beagle.targets.runner import Checked, Eager, FastRunner, Runner, example
from beagle.targets.shape import TreeShape

PROMPT_TOKENS = 16_384  # of a prompt that run in one pass where no layer needs a mask
MASK_ENTRIES = 2**23  # of one pass's mask, where there is one: queries times keys
LEAST_TOKENS = 64  # of a pass, however long the prompt


class Passes:
    """Runs the layers of a causal LM over tokens.

    Attributes:
        base: the model without its LM head, with our attention.
        layers: what its layers cache and see; set once they have been looked at.
        context_limit: most tokens of a prompt and its answer.
        eager: runs any plan.
        compiled: runs some plans faster, where there is such a runner.
    """

    layers: Layers

    def __init__(self, base: nn.Module, name: str, embedding: Tensor, device: torch.device, context_limit: int) -> None:
        self.base, self.name, self.device, self.context_limit = base, name, device, context_limit
        self.vocab_size, self.hidden_size = embedding.shape
        self.dtype = embedding.dtype
        self.eager: Runner = Eager(base)
        self.compiled: Checked | None = None

    @torch.no_grad()
    def use(self, runner: FastRunner) -> None:
        """Let a faster runner compute what it can from now on. Its trees are compared with the eager ones now, its
        other kinds of plans when the first one comes.

        Raises:
            BeagleError: it isn't this target's: its states are others.
        """
        self.compiled = Checked(runner, self.eager, self._example, self.name, self.hidden_size)
        try:
            self.compiled.check("tree")
        except Exception:
            self.compiled = None
            raise

    @property
    def chains_only(self) -> bool:
        """Whether layers with a recurrent state forbid trees with branches."""
        return bool(self.layers.recurrent)

    @property
    def can_capture(self) -> bool:
        """Whether a pass is the same kernels whatever the tokens are."""
        return not self.chains_only and not self.layers.indices

    def _example(self, kind: Kind) -> tuple[Tensor, Plan]:
        return example(kind, self.new_cache, self.layers.distinct_windows, self.vocab_size, self.eager)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """
        Args:
            batch: sequences.
            capacity: slots of each sequence, one for a token.
        Raises:
            BeagleError: there is no memory for it.
        """
        try:
            own = self.compiled.runner.new_cache(capacity) if self.compiled is not None and batch == 1 else None
            if own is not None:
                return own
            slots = -(-capacity // KEY_BLOCK) * KEY_BLOCK
            size: Any = {"batch": batch, "capacity": slots, "dtype": self.dtype, "device": self.device}
            if self.chains_only:
                return RecurrentCache(self.layers.cached, recurrent_layers=len(self.layers.recurrent), **size)
            return KVCache(self.layers.cached, **size)
        except RuntimeError as error:  # PyTorch's, whichever device is out of memory
            raise BeagleError(
                f"{self.name}: no memory for a KV cache of {capacity} tokens for {batch} answers at once; ask for fewer "
                "new tokens, a shorter prompt or fewer answers at once"
            ) from error

    def with_room(self, cache: KVCache, slots: int) -> KVCache:
        """This cache, or a copy of it with room for ``slots`` tokens of each sequence and for as many more as may come."""
        if slots <= cache.capacity:
            return cache
        most = self.context_limit + MAX_TREE_TOKENS  # a tree may reach over the context's end
        grown = self.new_cache(cache.batch, max(slots, min(2 * slots, most)))
        grown.lengths = [0] * cache.batch
        for i in range(cache.batch):
            grown.copy_sequence(i, cache, i)
        return grown

    def run(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One pass: ids ``[batch, tokens]`` to hidden states ``[batch, tokens, state_size]``."""
        fast = self.compiled
        runner = fast if fast is not None and fast.takes(plan) else self.eager
        states = runner(tokens, plan)
        return states if states.dtype == self.dtype else states.to(self.dtype)  # some recurrent models give fp32 always

    def prefill(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Run prompts of one length, and commit them: a long one piece by piece, so that no mask grows with n².

        A short one is a chain for the fast runner, where there is one.

        Args:
            ids: ``[batch, n]``.
            cache: of as many sequences; the prompts go on behind what it has committed, the same for all of them.
        Returns:
            Hidden states ``[batch, n, state_size]``.
        """
        layers, start, end = self.layers, cache.lengths[0], cache.lengths[0] + ids.shape[1]
        if self.compiled is not None and len(ids) == 1 and end - start <= MAX_TREE_TOKENS:
            chain = of_tree(cache, TreeShape.chain(end - start), layers.distinct_windows)
            if self.compiled.takes(chain):
                found = self.run(ids, chain)
                cache.lengths = [end]
                return found
        entries = MASK_ENTRIES // layers.mask_heads
        piece = max(LEAST_TOKENS, entries // end)
        whole = PROMPT_TOKENS if layers.are_plain else math.isqrt(entries)  # where nothing is before it
        states = []
        for first, last in pairwise([start, *range(start + piece if start else whole, end, piece), end]):
            plan = of_prompt(cache, first, last, layers.distinct_windows, layers.need_scores)
            states.append(self.run(ids[:, first - start : last - start], plan))
        cache.lengths = [end] * ids.shape[0]
        return states[0] if len(states) == 1 else torch.cat(states, dim=1)

    def verify(self, cache: KVCache, tokens: Tensor, shape: TreeShape, done: int = 0) -> Tensor:
        """Run a tree of tokens in one pass (nothing is committed: see ``KVCache.compact``).

        Each node sees the committed context, its ancestors and itself.

        Args:
            cache: of one sequence.
            tokens: ``[nodes - done]``, the root first.
            shape: of the tree.
            done: first nodes of the shape that an earlier call has run and nothing has overwritten
                since, so that a tree can grow level by level.
        Returns:
            Hidden states ``[nodes - done, state_size]``.
        """
        self._refuse_branches([shape])
        return self.run(tokens[None], of_tree(cache, shape, self.layers.distinct_windows, done))[0]

    def verify_trees(self, cache: KVCache, tokens: Tensor, shapes: list[TreeShape], first: int = 0) -> Tensor:
        """``verify`` for several sequences of a cache in one pass (nothing is committed).

        A prompt is a chain behind an empty sequence.

        Args:
            cache: of any number of sequences.
            tokens: ``[nodes of all trees]``, one tree's after the other's.
            shapes: a tree for each sequence.
            first: sequence of the first tree; the others follow.
        Returns:
            Hidden states ``[nodes of all trees, state_size]``.
        """
        self._refuse_branches(shapes)
        return self.run(tokens[None], of_trees(cache, shapes, self.layers.distinct_windows, first))[0]

    def _refuse_branches(self, shapes: list[TreeShape]) -> None:
        if self.chains_only and not all(shape.is_chain for shape in shapes):
            raise ValueError(f"{self.name} keeps a recurrent state, which runs chains; the tree has branches")
