"""A wrapped causal LM: embed, prefill, verify a tree, true states, logits."""

from __future__ import annotations

import math
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.hf import own_attention
from beagle.targets import probe
from beagle.targets.attention import NAME, Pass, current_pass
from beagle.targets.cache import KVCache
from beagle.targets.compiled import FastPass
from beagle.targets.exact import ExactPasses
from beagle.targets.family import (
    base_of,
    context_limit,
    difference,
    eos_ids,
    refuse_unsupported,
    sample_ids,
    weights_digest,
    weights_of_a_pass,
)
from beagle.targets.packing import pack_linears, packed
from beagle.targets.probe import Layers
from beagle.targets.quantize import BITS, RowQuantizer, check_kind, quantize_linears, quantized
from beagle.targets.ragged import RaggedPasses
from beagle.targets.shape import TreeShape

PROMPT_TOKENS = 16_384  # of a prompt that run in one pass where no layer needs a mask
MASK_ENTRIES = 2**23  # of one pass's mask, where there is one: queries times keys
LEAST_TOKENS = 64  # of a pass, however long the prompt
# by which states may differ from the model's own, as a share of their size (see ``difference``): rounding only
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


class Target:
    """Any Hugging Face causal LM whose layers go through transformers' attention interface.

    A *true state* is the last hidden state after the final norm, so that ``logits(state)`` is the
    distribution of the next token (paper §2).

    Attributes:
        pass_weights: weights that a pass multiplies each token with: layers and LM head.
        pass_bytes: what they take in memory, read once a pass.
        digest: of the model's weights, however they are kept here.
        layers: what the attention layers cache and see.
        context_limit: most tokens of a prompt and its answer.
        context_ends: why it ends before the model's own context; empty where it does not.
        exact: passes of exact mode.
    """

    def __init__(
        self,
        model: nn.Module,
        tokenizer: Any,
        name: str,
        quantize: str | None = None,
        probes: Path | None = None,
        pack: bool = True,
    ) -> None:
        """
        Args:
            model: a causal LM of transformers; it is changed and of no other use afterwards.
            tokenizer: the model's own.
            name: what errors call it.
            quantize: ``int8`` or ``int4`` linear layers and LM head (see ``targets.quantize``); the embedding,
                and the rows of the LM head that drafters and training read, keep their dtype.
            probes: folder that remembers which models were compared with their own attention; None: compare.
            pack: reorder weights for the CPU's kernels (see ``targets.packing``). Without, passes read the model's
                own weights, whatever is written to them later.
        Raises:
            BeagleError: the family keeps no plain KV cache, or computes something that the pass does not;
                or there is no kernel to quantise with.
        """
        check_kind(quantize)
        refuse_unsupported(model.config, name)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        self.base = base_of(model)
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        weight: Tensor = self.embed.weight
        self.vocab_size, self.hidden_size = weight.shape
        self.device, self.dtype = weight.device, weight.dtype
        self.context_limit, self.context_ends = context_limit(self.config)
        self.eos_ids = eos_ids(model, tokenizer)
        self._logit_scale = float(getattr(self.config, "logit_scale", 1.0) or 1.0) / float(
            getattr(self.config, "logits_scaling", 1.0) or 1.0
        )
        self._logit_softcap = getattr(self.config, "final_logit_softcapping", None)
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.digest = weights_digest(model)
        self.pass_weights, self.pass_bytes = weights_of_a_pass(self.base, self.head, self.embed)
        self.quantize = quantize
        self.unquantized = quantize_linears(self.base, quantize) if quantize else []  # layers whose shape can't be
        if quantize:
            self.pass_bytes = self.pass_weights * BITS[quantize] // 8
        if not isinstance(getattr(self.head, "weight", None), Tensor):
            raise BeagleError(
                f"{name}: its LM head is a {type(self.head).__name__}, not one linear layer; choose another model"
            )
        if pack:
            pack_linears(self.base)
        linear = pack and isinstance(self.head, nn.Linear)
        self._apply_head = packed(self.head.weight.detach(), self.head.bias) if linear else self.head
        self.compiled: FastPass | None = None
        self.exact = ExactPasses(self)
        self._ragged = RaggedPasses(self)
        self.layers = self._probe(probes)
        self.layer_count = len(self.layers.shapes)
        if quantize:  # after the probe, which compares with the model's own LM head
            apply = quantized(self.head.weight.detach(), self.head.bias, quantize, RowQuantizer())
            if apply is None:
                self.unquantized.append("LM head")
            else:
                self._apply_head = apply

    @torch.no_grad()
    def _probe(self, folder: Path | None) -> Layers:
        """Learn what the layers cache and see, and that every kind of pass gives what the model itself gives."""
        model: Any = self.model
        key = probe.key_of(model, self.digest, self.quantize) if folder is not None else ""
        if folder is not None and (known := probe.remembered(folder, key)) is not None:
            model.set_attn_implementation(NAME)
            known.mark(self.base)
            return known
        own = own_attention(model, NAME)
        layers = probe.learn(model, self.name, int(self.config.num_hidden_layers))
        model.set_attn_implementation(own)
        finite = [w for w in layers.windows if w is not None and w <= probe.MOST_WINDOW]
        n = min(max(finite, default=0) + probe.TOKENS, self.context_limit)
        ids = sample_ids(model.config, self.vocab_size, n).to(self.device)
        expected: Tensor = self.base(input_ids=ids[None], use_cache=False)[0][0]
        few = ids[None, : min(n, 12)]
        logits, states = model(input_ids=few, use_cache=False).logits, self.base(input_ids=few, use_cache=False)[0]
        model.set_attn_implementation(NAME)
        if not expected.isfinite().all():
            raise BeagleError(
                f"{self.name}: its states are no finite numbers; load it with dtype float32, or check its weights"
            )
        if not torch.allclose(logits, self.logits(states), rtol=0.05, atol=0.05):
            raise BeagleError(
                f"{self.name}: its logits are more than one linear layer over the last hidden state, so this family "
                "can't be served; choose another model"
            )
        self.layers = layers
        self._compare(ids, expected)
        if folder is not None:
            probe.remember(folder, key, layers)
        return layers

    def _compare(self, ids: Tensor, expected: Tensor) -> None:
        """
        Args:
            ids: ``[n]``. expected: the model's own states of them ``[n, hidden]``.
        Raises:
            BeagleError: prompt, single tokens or a tree give others, beyond rounding.
        """
        n = len(ids)
        tree, shape = ids.new_tensor([0, 1, 2, 3, 0, 3]), TreeShape([-1, 0, 0, 2, 2, 3])  # its path: 0 2 3 5
        steps = min(4, n - 7)
        if steps < 0:
            return  # a context of a few tokens: nothing to draft in
        begin = n - steps - 5
        cache = self.new_cache(1, n + len(tree))
        found = {"a prompt": (self.prefill(ids[None, :begin], cache)[0], expected[:begin])}
        singles = []
        for at in range(begin, begin + steps):
            singles.append(self.verify(cache, ids[at : at + 1], TreeShape([-1])))
            cache.compact([0])
        at, path = begin + steps, [0, 2, 3, 5]
        tree[path] = ids[at : at + 4]
        tree[[1, 4]] = (ids[at + 1 : at + 3] + 1) % self.vocab_size
        drafted = self.verify(cache, tree, shape)[path]
        cache.compact(path)
        singles.append(self.verify(cache, ids[n - 1 :], TreeShape([-1])))
        found["single tokens"] = torch.cat(singles), torch.cat([expected[begin:at], expected[n - 1 :]])
        found["a tree"] = drafted, expected[at : at + 4]
        for what, (states, own) in found.items():
            self.refuse_difference(states, own, what)

    def refuse_difference(self, states: Tensor, expected: Tensor, what: str) -> None:
        """
        Args:
            states: ``[n, hidden]`` of one kind of pass. expected: the model's own. what: names the kind.
        Raises:
            BeagleError: they differ by more than rounding.
        """
        gap = difference(states, expected)
        if not gap < TOLERANCE[self.dtype]:  # also catches NaN
            raise BeagleError(
                f"{self.name}: {what} gives other hidden states here than in the model itself (by {gap:.2g} of their "
                "size), so this family keeps a state or a mask that can't be served; choose a model with plain "
                "attention in every layer"
            )

    @torch.no_grad()
    def use(self, compiled: FastPass) -> None:
        """Let trees run in a faster pass from now on; those of exact mode and over several rows
        are compared when they are first asked for.

        Raises:
            BeagleError: it isn't this target's: its states are others.
        """
        expected = self._states_of_a_chain()
        self.compiled = compiled
        try:
            self.refuse_others(compiled, self._states_of_a_chain(), expected)
        except Exception:
            self.compiled = None
            raise

    def _states_of_a_chain(self) -> Tensor:
        ids = torch.arange(1, 11, device=self.device) % self.vocab_size
        cache = self.new_cache(1, 16)
        self.prefill(ids[None, :6], cache)
        return self.verify(cache, ids[6:], TreeShape.chain(4))

    def refuse_others(self, compiled: FastPass, states: Tensor, expected: Tensor) -> None:
        """
        Raises:
            BeagleError: the compiled pass gave other states than the eager one, beyond rounding.
        """
        gap = (states - expected).abs().max() / expected.abs().max()
        if not gap < 0.1:  # also catches NaN
            raise BeagleError(f"{self.name}: the {compiled.kind} pass computes something else; {compiled.remedy}")

    def forward(self, ids: Tensor, positions: Tensor, plan: Pass) -> Tensor:
        """The eager pass: ``[batch, n]`` ids and positions to true states ``[batch, n, hidden]``."""
        token = current_pass.set(plan)
        try:
            return self.base(input_ids=ids, position_ids=positions, use_cache=False)[0]
        finally:
            current_pass.reset(token)

    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values in the cache, all layers."""
        return sum(c.kv_heads * (c.key_dim + c.value_dim) for c in self.layers.shapes) * self.dtype.itemsize

    def slot_operations(self) -> int:
        """Operations of attention for one row and one key, all layers."""
        shapes = zip(self.layers.heads, self.layers.shapes, strict=True)
        return sum(2 * heads * (c.key_dim + c.value_dim) for heads, c in shapes)

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        """
        Args:
            batch: rows.
            capacity: slots of each row, one for a token.
        Raises:
            BeagleError: there is no memory for it.
        """
        try:
            own = self.compiled.new_cache(capacity) if self.compiled is not None and batch == 1 else None
            return own or KVCache(
                self.layers.shapes, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device
            )
        except RuntimeError as error:  # PyTorch's, whichever device is out of memory
            raise BeagleError(
                f"{self.name}: no memory for a KV cache of {capacity} tokens for {batch} answers at once; ask for fewer "
                "new tokens, a shorter prompt or fewer answers at once"
            ) from error

    def with_room(self, cache: KVCache, slots: int) -> KVCache:
        """This cache, or a copy of it with room for ``slots`` tokens of each row and as many more."""
        if slots <= cache.capacity:
            return cache
        grown = self.new_cache(cache.batch, 2 * slots)
        grown.lengths = [0] * cache.batch
        for row in range(cache.batch):
            grown.copy_row(row, cache, row)
        return grown

    @torch.no_grad()
    def logits(self, states: Tensor) -> Tensor:
        """``[..., hidden]`` to ``[..., vocabulary]``, in the model's dtype."""
        out: Tensor = self._apply_head(states)
        if self._logit_scale != 1.0:
            out = out * self._logit_scale
        if self._logit_softcap is not None:
            out = torch.tanh(out / self._logit_softcap) * self._logit_softcap
        return out

    def head_rows(self, index: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Weight ``[rows, hidden]`` and bias ``[rows]`` of the LM head for some tokens (all if None).

        They carry the model's logit scale; a soft cap, which changes no order, is left out.
        """
        weight: Tensor = self.head.weight  # type: ignore[assignment]
        bias: Tensor | None = self.head.bias  # type: ignore[assignment]
        if index is not None:
            weight, bias = weight[index], None if bias is None else bias[index]
        if self._logit_scale != 1.0:
            weight, bias = weight * self._logit_scale, None if bias is None else bias * self._logit_scale
        return weight.detach(), None if bias is None else bias.detach()

    @torch.no_grad()
    def prefill(self, ids: Tensor, cache: KVCache) -> Tensor:
        """Run prompts of one length, a long one piece by piece so that no mask grows with n², and commit them.

        Args:
            ids: ``[batch, n]``.
            cache: of as many sequences; the prompts go on behind what it has committed, the same for all of them.
        Returns:
            True states ``[batch, n, hidden]``.
        """
        before, n = cache.lengths[0], cache.lengths[0] + ids.shape[1]
        positions = torch.arange(n, device=self.device)[None]
        states = []
        whole = PROMPT_TOKENS if self.layers.are_plain else math.isqrt(MASK_ENTRIES)
        whole = whole if not before else before + max(LEAST_TOKENS, MASK_ENTRIES // n)
        for first, last in pairwise([before, *range(whole, n, max(LEAST_TOKENS, MASK_ENTRIES // n)), n]):
            own = positions[:, first:last]
            plan = Pass(cache, slots=slice(first, last), key_positions=positions[:, :last], query_positions=own)
            states.append(self.forward(ids[:, first - before : last - before], own, plan))
        cache.lengths = [n] * ids.shape[0]
        return states[0] if len(states) == 1 else torch.cat(states, dim=1)

    @torch.no_grad()
    def verify(self, cache: KVCache, tokens: Tensor, shape: TreeShape, done: int = 0) -> Tensor:
        """Run a tree of tokens in one pass (nothing is committed: see ``KVCache.compact``).

        Each node sees the committed context, its ancestors and itself.

        Args:
            tokens: ``[nodes - done]``, the root first.
            done: first nodes of the shape that an earlier call has run and nothing has overwritten
                since, so that a tree can grow level by level.
        Returns:
            True states ``[nodes - done, hidden]``.
        """
        start, n = cache.length, len(shape.parents)
        positions = (start + torch.tensor(shape.depths(), device=self.device))[None]
        visible = torch.ones(1, n - done, start + n, dtype=torch.bool, device=self.device)
        visible[0, :, start:] = shape.ancestors()[done:].to(self.device)
        context = torch.arange(start, device=self.device)
        plan = Pass(
            cache,
            slots=slice(start + done, start + n),
            key_positions=torch.cat([context, positions[0]])[None],
            query_positions=positions[:, done:],
            visible=visible,
        )
        if self.compiled is not None and self.compiled.takes(cache, n - done, start + n):
            return self.compiled(self.embed(tokens[None]), plan)[0]
        return self.forward(tokens[None], positions[:, done:], plan)[0]

    @torch.no_grad()
    def verify_rows(self, cache: KVCache, tokens: Tensor, shapes: list[TreeShape], first: int = 0) -> Tensor:
        """``verify`` for rows ``first``, ``first + 1``, … of a cache in one pass (nothing is committed).

        A prompt is a chain behind an empty row.

        Args:
            tokens: ``[nodes of all rows]``, one row's after the other's. shapes: one for each row.
        Returns:
            True states ``[nodes of all rows, hidden]``.
        """
        return self._ragged.verify(cache, tokens, shapes, first)
