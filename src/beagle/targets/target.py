"""A wrapped causal LM: prefill, verify a tree, hidden states, logits."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.hf import own_attention
from beagle.limits import MAX_TREE_TOKENS
from beagle.ranks import ALONE, Ranks
from beagle.targets import probe, proof
from beagle.targets.attention import NAME
from beagle.targets.cache import KVCache
from beagle.targets.counting import give_positions
from beagle.targets.devices import device_of, refuse_planned_attention
from beagle.targets.family import (
    base_of,
    context_limit,
    eos_ids,
    refuse_unsupported,
    sample_ids,
    weights_digest,
    weights_of_a_pass,
    whole_of,
)
from beagle.targets.head_transform import move_transform
from beagle.targets.layers import Layers, key_of, remember, remembered
from beagle.targets.linears.packed import keep_read_linears, pack_linears
from beagle.targets.linears.quantized import BITS, check_kind, quantize_linears
from beagle.targets.lm_head import LMHead
from beagle.targets.plan import (
    EXACT_BLOCK,
    EXACT_TOKENS,
    KEY_BLOCK,
    Kind,
    Plan,
    of_exact_tree,
    of_prompt,
    of_tree,
    of_trees,
    span,
)
from beagle.targets.recurrent_cache import RecurrentCache
from beagle.targets.runner import Checked, Eager, FastRunner, Runner, example, tap
from beagle.targets.shape import TreeShape

PROMPT_TOKENS = 16_384  # of a prompt that run in one pass where no layer needs a mask
MASK_ENTRIES = 2**23  # of one pass's mask, where there is one: queries times keys
LEAST_TOKENS = 64  # of a pass, however long the prompt


class Target:
    """Any Hugging Face causal LM whose layers go through transformers' attention interface.

    Its *hidden states* are the last ones after the final norm, so that ``logits(state)`` is the distribution of the
    next token (the paper's true states, §2); where draft heads read more layers, the outputs of those stand before them.

    Attributes:
        pass_weights: weights that a pass multiplies each token with: layers and LM head.
        pass_bytes: what they take in memory, read once a pass.
        digest: of the model's weights, however they are kept here.
        layers: what the attention layers cache and see.
        state_layers: numbers of the layers whose outputs are part of a hidden state.
        state_size: width of a hidden state, ``hidden_size`` for each of them and for the top one.
        context_limit: most tokens of a prompt and its answer.
        context_ends: why it ends before the model's own context; empty where it does not.
        eager: runs any plan.
        compiled: runs some plans faster, where there is such a runner.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        quantize: str | None = None,
        probes: Path | None = None,
        pack: bool = True,
        state_layers: Sequence[int] = (),
        ranks: Ranks = ALONE,
    ) -> None:
        """
        Args:
            model: a causal LM of transformers; it is changed and of no other use afterwards.
            tokenizer: the model's own.
            name: what errors call it.
            quantize: ``int8`` or ``int4`` linear layers and LM head (see ``targets.linears.quantized``); the embedding,
                and the rows of the LM head that drafters and training read, keep their dtype.
            probes: folder that remembers which models were compared with their own attention; None: compare.
            pack: reorder weights for the CPU's kernels (see ``targets.linears.packed``). Without, passes read the model's
                own weights, whatever is written to them later.
            state_layers: numbers of the layers, from 1 on, whose outputs a draft head reads beside the top state.
            ranks: that the model's layers are divided among; each runs the same passes at the same time.
        Raises:
            BeagleError: the family keeps no plain KV cache, or computes something that the pass does not;
                or there is no kernel to quantise with, or no such layer.
        """
        check_kind(quantize)
        refuse_unsupported(model.config, name)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.ranks = ranks
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        self.base = base_of(model)
        self.head: nn.Module = move_transform(model)  # type: ignore[assignment]
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        weight: Tensor = self.embed.weight
        self.vocab_size, self.hidden_size = weight.shape
        rows = getattr(self.head, "weight", None)
        if isinstance(rows, Tensor):  # some embed more tokens than they answer with
            self.vocab_size = min(self.vocab_size, len(rows))
        self.device, self.dtype = device_of(model), weight.dtype
        refuse_planned_attention(self.device)
        self.context_limit, self.context_ends = context_limit(self.config)
        self.eos_ids = eos_ids(model, tokenizer)
        model.eval().requires_grad_(False)
        self.digest = weights_digest(model)
        self._lm_head = LMHead(self.head, self.config, name, pack)
        self.pass_weights, self.pass_bytes = weights_of_a_pass(self.base, self.head, self.embed)
        self.quantize = quantize
        if quantize or pack:
            with probe.tokens_alone(name):
                keep_read_linears(self.base)
        self.unquantized = quantize_linears(self.base, quantize) if quantize else []  # layers whose shape can't be
        if quantize:
            self.pass_bytes = self.pass_weights * BITS[quantize] // 8
        if pack:
            pack_linears(self.base)
        self.eager: Runner = Eager(self.base)
        self.compiled: Checked | None = None
        self.layers = self._probe(probes)
        if self.layers.unscaled:
            self._lm_head = self._lm_head.without_scale()
        self.layer_count = len(self.layers.shapes)
        self.state_layers = tuple(state_layers)
        self.state_size = self.hidden_size * (len(self.state_layers) + 1)
        tap(self.base, self.state_layers, self.layer_count, name)
        if quantize and not self._lm_head.quantize(quantize):  # after the probe, which compares with the model's own
            self.unquantized.append("LM head")

    @torch.no_grad()
    def _probe(self, folder: Path | None) -> Layers:
        """Learn what the layers cache and see, and that every kind of pass gives what the model itself gives."""
        model: Any = self.model
        key = key_of(model, self.digest, self.quantize) if folder is not None else ""
        if folder is not None and (known := remembered(folder, key)) is not None:
            if not known.own:
                model.set_attn_implementation(NAME)
            known.mark(self.base)
            return known
        own = own_attention(model, NAME)
        layers = probe.learn(model, self.name, int(self.config.num_hidden_layers))
        if not layers.own:
            model.set_attn_implementation(own)
        spans = [span(window) or 0 for window in layers.distinct_windows]
        finite = [tokens for tokens in spans if tokens <= probe.MOST_WINDOW]
        n = min(max(finite, default=0) + probe.TOKENS, self.context_limit)
        ids = sample_ids(model.config, self.vocab_size, n).to(self.device)
        whole = whole_of(model)
        few = ids[None, : min(n, 12)]
        with probe.tokens_alone(self.name):
            expected: Tensor = whole(input_ids=ids[None], use_cache=False)[0][0].to(self.dtype)
            logits = model(input_ids=few, use_cache=False).logits
        if not layers.own:
            model.set_attn_implementation(NAME)
        self.layers = layers
        try:
            with probe.tokens_alone(self.name):
                self._prove(ids, expected, own)
        except proof.Different as error:
            expected, logits = self._given_positions(ids, few, expected, own, error)
        states = expected[: few.shape[1]]  # causal, so that no pass of the few alone is needed
        heads = (self._lm_head, self._lm_head.without_scale())
        rows: Any = self.head.weight
        if states.shape[-1] == rows.shape[-1] != self.hidden_size:
            raise BeagleError(
                f"{self.name}: its LM head reads {rows.shape[-1]} numbers a token and its embedding gives "
                f"{self.hidden_size}, so draft heads, which read both, have no width; choose a model where they are equal"
            )
        fits = states.shape[-1] == rows.shape[-1]
        gaps = [proof.difference(head(states), logits[0]) if fits else math.inf for head in heads]
        if not min(gaps) < proof.TOLERANCE[self.dtype]:
            raise BeagleError(
                f"{self.name}: its logits are more than one linear layer over a hidden state, which draft heads can't "
                "learn to predict; choose a model whose LM head ends with a linear layer"
            )
        layers = replace(self.layers, unscaled=gaps[1] < gaps[0])
        if folder is not None:
            remember(folder, key, layers)
        return layers

    def _given_positions(
        self, ids: Tensor, few: Tensor, expected: Tensor, own: str, error: proof.Different
    ) -> tuple[Tensor, Tensor]:
        """Compare once more where the model alone numbers its tokens otherwise than from 0 on, as its ``generate`` does.

        Args:
            ids: ``[n]``.
            few: the first of them, ``[1, few]``.
            expected: the model's states of ``ids`` where it is given no positions.
            own: the model's own attention.
            error: what the comparison came to.
        Returns:
            The model's own states of ``ids`` and logits of ``few`` at the positions that its ``generate`` gives.
        """
        model: Any = self.model
        if not self.layers.own:
            model.set_attn_implementation(own)
        if self.chains_only:
            raise error
        states = proof.at_positions(model, whole_of(model), ids, expected)
        if states is None and self.layers.own and give_positions(self.base):
            self.layers = replace(self.layers, counted=True)
            with probe.tokens_alone(self.name):
                self._prove(ids, expected, own)
            return expected, model(input_ids=few, use_cache=False).logits
        if states is None:
            raise BeagleError(
                f"{self.name}: it numbers its tokens in a way of its own, so that those of a draft can't be given their "
                "positions; choose a model that takes position_ids"
            ) from error
        if proof.difference(states, expected) < proof.TOLERANCE[self.dtype]:
            raise error
        logits: Tensor = model(input_ids=few, use_cache=False, **proof.given_positions(model, few[0])).logits
        if not self.layers.own:
            model.set_attn_implementation(NAME)
        with probe.tokens_alone(self.name):
            self._prove(ids, states, own)
        return states, logits

    def _prove(self, ids: Tensor, expected: Tensor, own: str) -> None:
        """``proof.prove``. Recurrent layers that forget their state before several tokens get one at a time.

        Where transformers' single tokens are others than those of a text, its decoding counts.
        """
        try:
            proof.prove(self, ids, expected)
        except proof.Different:
            if not self.chains_only:
                raise
            model: Any = self.model
            model.set_attn_implementation(own)
            steps = proof.by_steps(whole_of(model), ids).to(self.dtype)
            model.set_attn_implementation(NAME)
            if not proof.difference(steps, expected) < proof.TOLERANCE[self.dtype]:
                proof.prove(self, ids, steps)
                return
            self.layers = replace(self.layers, one_by_one=True)
            self.layers.mark(self.base)
            proof.prove(self, ids, expected)

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

    @torch.no_grad()
    def run(self, tokens: Tensor, plan: Plan) -> Tensor:
        """One pass: ids ``[batch, tokens]`` to hidden states ``[batch, tokens, state_size]``."""
        fast = self.compiled
        runner = fast if fast is not None and fast.takes(plan) else self.eager
        return runner(tokens, plan).to(self.dtype)  # some recurrent models give fp32 ones whatever their weights are

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

    @property
    def has_exact(self) -> bool:
        """Whether there are exact passes."""
        return not self.chains_only

    def refuse_exact(self) -> None:
        """
        Raises:
            BeagleError: there are no exact passes of this target.
        """
        if not self.has_exact:
            raise BeagleError(
                f"{self.name} keeps a recurrent state, whose bits depend on how many tokens share a pass, so there is no "
                "exact mode for it; leave exact out, and load it with dtype float32 where near-ties matter"
            )

    def verify_exact(self, cache: KVCache, tokens: Tensor, shape: TreeShape, keys: int) -> Tensor:
        """``verify`` in exact mode: states bit-equal to those of one node at a time.

        Args:
            cache: of one sequence.
            tokens: ``[nodes]``, at most ``EXACT_TOKENS`` of them.
            shape: of the tree.
            keys: padded number of keys of every pass of this generation.
        Returns:
            Hidden states ``[nodes, state_size]``.
        Raises:
            BeagleError: as of ``refuse_exact``.
        """
        self.refuse_exact()
        return self._run_exact(cache, tokens, shape, keys, max(len(tokens), self.min_exact_tokens))

    def _run_exact(self, cache: KVCache, tokens: Tensor, shape: TreeShape, keys: int, count: int) -> Tensor:
        """A pass of ``count`` tokens, of which the first are given."""
        plan = of_exact_tree(cache, shape, keys, count, self.layers.distinct_windows)
        return self.run(F.pad(tokens, (0, count - len(tokens)))[None], plan)[0, : len(tokens)]

    @cached_property
    def min_exact_tokens(self) -> int:
        """Tokens from which on a token's bits are the same however many share an exact pass, on this machine.

        Packed CPU kernels differ for a single token at most, GPU libraries for every number (then it is
        ``EXACT_TOKENS``: all passes have as many). Tried out on a chain, for every number of tokens from two on.
        """
        self.refuse_exact()
        ids = sample_ids(self.config, self.vocab_size, EXACT_TOKENS + 8).to(self.device)
        keys = 2 * EXACT_BLOCK
        cache = self.new_cache(1, keys)
        self.prefill(ids[None, :8], cache)

        def states_of(n: int) -> Tensor:
            return self._run_exact(cache, ids[8 : 8 + n], TreeShape.chain(n), keys, n)

        expected = self.verify(cache, ids[8:], TreeShape.chain(EXACT_TOKENS))
        proof.refuse_difference(states_of(EXACT_TOKENS), expected, "exact mode", self.name)
        # A single token takes other kernels, which differ so rarely that few tokens don't show it (on CPUs with AMX one
        # bf16 output in some 10,000); and a graph of any number of tokens is no graph of one.
        compiled = self.compiled is not None and "exact" in self.compiled.runner.kinds
        least = 1 if self.dtype == torch.float32 and not compiled else 2
        return proof.first_equal(lambda n: (states := states_of(n), self.logits(states)), least, EXACT_TOKENS)

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """Of hidden states ``[..., state_size]``, or top states ``[..., hidden]``: ``[..., vocabulary]`` in the model's dtype."""
        return self._lm_head(states[..., -self.hidden_size :])

    def columns(self, layers: Sequence[int]) -> Tensor | None:
        """What of a hidden state a draft head reads.

        Args:
            layers: numbers of the layers that it reads beside the top state.
        Returns:
            Indices into a hidden state, ``[hidden * (layers + 1)]``; None: all of it.
        Raises:
            BeagleError: the target wasn't loaded with them.
        """
        if tuple(layers) == self.state_layers:
            return None
        if missing := set(layers) - set(self.state_layers):
            raise BeagleError(
                f"the draft head reads layers {', '.join(map(str, layers))} of {self.name}, which was loaded without "
                f"{', '.join(map(str, sorted(missing)))}; load it with state_layers={tuple(layers)}"
            )
        parts = [*map(self.state_layers.index, layers), len(self.state_layers)]
        whole = torch.arange(self.state_size, device=self.device).view(-1, self.hidden_size)
        return whole[parts].flatten()

    def exact_logits(self, states: Tensor) -> Tensor:
        """``logits`` of ``[nodes, state_size]`` in exact mode."""
        missing = max(0, self.min_exact_tokens - len(states))
        return self.logits(F.pad(states, (0, 0, 0, missing)))[: len(states)]

    def head_rows(self, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[rows, hidden]`` and bias ``[rows]`` of the LM head for some tokens (see ``LMHead.rows``)."""
        return self._lm_head.rows(index)
