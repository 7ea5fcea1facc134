"""A wrapped causal LM: embed, prefill, verify a tree, true states, logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.targets.attention import NAME, Pass, ShapeProbe, current_pass
from beagle.targets.cache import KVCache
from beagle.targets.compiled import FastPass
from beagle.targets.exact import ExactPasses
from beagle.targets.family import eos_ids, refuse_unsupported, weights_digest, weights_of_a_pass
from beagle.targets.packing import pack_linears, packed
from beagle.targets.quantize import BITS, RowQuantizer, check_kind, quantize_linears, quantized
from beagle.targets.ragged import RaggedPasses
from beagle.targets.shape import TreeShape


class Target:
    """Any Hugging Face causal LM whose layers go through transformers' attention interface.

    A *true state* is the last hidden state after the final norm, so that ``logits(state)`` is the
    distribution of the next token (paper §2).

    Attributes:
        pass_weights: weights that a pass multiplies each row with: layers and LM head. pass_bytes: what they take
            in memory, read once a pass. digest: of the model's weights, however they are kept here. exact: passes of
            exact mode.
        config: of the language model. heads: query heads of each layer. head_dim: of a key in the first layer.
    """

    def __init__(self, model: nn.Module, tokenizer: Any, name: str, quantize: str | None = None) -> None:
        """
        Args:
            quantize: ``int8`` or ``int4`` linear layers and LM head (see ``targets.quantize``); the embedding,
                and the rows of the LM head that drafters and training read, keep their dtype.
        Raises:
            BeagleError: the family keeps no plain KV cache, or ignores what the pass needs; or there is no
                kernel to quantise with.
        """
        check_kind(quantize)
        whole: Any = model.config
        refuse_unsupported(whole, name)
        config = whole.get_text_config()  # of a model that also sees or hears: its language model's
        refuse_unsupported(config, name)
        self.model = model
        self.tokenizer = tokenizer
        self.name = name
        self.config: Any = config
        self.base: nn.Module = model.base_model  # type: ignore[assignment]
        self.head: nn.Module = model.get_output_embeddings()  # type: ignore[operator]
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        weight: Tensor = self.embed.weight
        self.vocab_size, self.hidden_size = weight.shape
        self.device, self.dtype = weight.device, weight.dtype
        self.context_limit = int(getattr(config, "max_position_embeddings", 0) or 2**31)
        self.eos_ids = eos_ids(model, tokenizer)
        self._logit_scale = float(getattr(config, "logit_scale", 1.0) or 1.0) / float(
            getattr(config, "logits_scaling", 1.0) or 1.0
        )
        self._logit_softcap = getattr(config, "final_logit_softcapping", None)
        model.set_attn_implementation(NAME)  # type: ignore[operator]
        model.eval()
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        self.digest = weights_digest(model)
        self.pass_weights, self.pass_bytes = weights_of_a_pass(self.base, self.head, self.embed)
        self.quantize = quantize
        self.unquantized = quantize_linears(self.base, quantize) if quantize else []  # layers whose shape can't be
        if quantize:
            self.pass_bytes = self.pass_weights * BITS[quantize] // 8
        pack_linears(self.base)
        linear = isinstance(self.head, nn.Linear)
        self._apply_head = packed(self.head.weight.detach(), self.head.bias) if linear else self.head
        self.compiled: FastPass | None = None
        self.exact = ExactPasses(self)
        self._ragged = RaggedPasses(self)
        self._layers = self._probe()
        self.layer_count = len(self._layers)
        if quantize:  # after the probe, which compares with the model's own LM head
            weight, bias = self.head.weight.detach(), self.head.bias
            apply = quantized(weight, bias, quantize, RowQuantizer())
            if apply is None:
                self.unquantized.append("LM head")
            else:
                self._apply_head = apply

    @torch.no_grad()
    def _probe(self) -> list[Any]:
        """Learn the cache's shape, and that a token at a time gives what one pass gives."""
        ids = torch.arange(1, 7, device=self.device)[None] % self.vocab_size
        probe = ShapeProbe()
        whole = self.forward(ids, torch.arange(6, device=self.device)[None], probe)
        layers = [probe.layers[i] for i in sorted(probe.layers)]
        expected = int(getattr(self.config, "num_hidden_layers", len(layers)))
        self._layers, self.heads, self.head_dim = layers, probe.heads, layers[0].key_dim if layers else 0
        if probe.layers_seen != expected or sorted(probe.layers) != list(range(expected)):
            raise BeagleError(
                f"{self.name}: only {probe.layers_seen} of {expected} layers use transformers' attention "
                "interface, so this family can't be served; choose a model with plain attention in every layer"
            )
        if not isinstance(self.head, nn.Linear) or not torch.allclose(
            self._forward_logits(ids), self.logits(whole), rtol=0.05, atol=0.05
        ):
            raise BeagleError(
                f"{self.name}: its logits are more than one linear layer over the last hidden state, so this family "
                "can't be served; choose another model"
            )
        cache = self.new_cache(1, 8)
        self.prefill(ids[:, :4], cache)
        states = self.verify(cache, ids[0, 4:], TreeShape([-1, 0]))
        gap = (states - whole[0, 4:]).abs().max() / whole.abs().max()
        if not gap < 0.1:  # also catches NaN
            raise BeagleError(
                f"{self.name}: a token at a time gives other states than one pass, so this family keeps a state "
                "that beagle doesn't know; choose a model with plain attention in every layer"
            )
        return layers

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

    def _forward_logits(self, ids: Tensor) -> Tensor:
        """The model's own logits, for the probe."""
        token = current_pass.set(ShapeProbe())
        try:
            positions = torch.arange(ids.shape[1], device=self.device)[None]
            out: Tensor = self.model(input_ids=ids, position_ids=positions, use_cache=False).logits
            return out
        finally:
            current_pass.reset(token)

    def slot_bytes(self) -> int:
        """Bytes of one token's keys and values in the cache, all layers."""
        return sum(c.kv_heads * (c.key_dim + c.value_dim) for c in self._layers) * self.dtype.itemsize

    def slot_operations(self) -> int:
        """Operations of attention for one row and one key, all layers."""
        return sum(2 * heads * (c.key_dim + c.value_dim) for heads, c in zip(self.heads, self._layers, strict=True))

    def new_cache(self, batch: int, capacity: int) -> KVCache:
        own = self.compiled.new_cache(capacity) if self.compiled is not None and batch == 1 else None
        return own or KVCache(self._layers, batch=batch, capacity=capacity, dtype=self.dtype, device=self.device)

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
    def prefill(self, ids: Tensor, cache: KVCache, lengths: list[int] | None = None) -> Tensor:
        """Run prompts on an empty cache.

        Args:
            ids: ``[batch, n]``, padded at the right where ``lengths`` says so.
            lengths: real tokens per row (all n if not given).
        Returns:
            True states ``[batch, n, hidden]``; those of padding mean nothing.
        """
        n = ids.shape[1]
        positions = torch.arange(n, device=self.device)[None]
        plan = Pass(
            cache,
            slots=slice(0, n),
            key_positions=positions,
            query_positions=positions,
            visible=positions[:, :, None] >= positions[:, None, :],
        )
        states = self.forward(ids, positions, plan)
        cache.lengths = list(lengths) if lengths is not None else [n] * ids.shape[0]
        return states

    @torch.no_grad()
    def step(self, ids: Tensor, cache: KVCache) -> Tensor:
        """One more token for every row of a batch, committed at once.

        Args:
            ids: ``[batch]``.
        Returns:
            True states ``[batch, hidden]``.
        """
        lengths = torch.tensor(cache.lengths, device=self.device)
        keys = torch.arange(max(cache.lengths) + 1, device=self.device)[None]
        plan = Pass(
            cache,
            slots=lengths,
            key_positions=keys,
            query_positions=lengths[:, None],
            visible=(keys <= lengths[:, None])[:, None],
        )
        states = self.forward(ids[:, None], lengths[:, None], plan)
        cache.lengths = [n + 1 for n in cache.lengths]
        return states[:, 0]

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
