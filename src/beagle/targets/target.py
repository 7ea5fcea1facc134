"""A wrapped causal LM: its passes, exact ones too, hidden states and logits."""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.ranks import ALONE, Ranks
from beagle.targets import probe, proof
from beagle.targets.admission import admit
from beagle.targets.attention import NAME
from beagle.targets.cache import KVCache
from beagle.targets.devices import device_of, refuse_planned_attention
from beagle.targets.family import (
    base_of,
    context_limit,
    eos_ids,
    refuse_unsupported,
    sample_ids,
    weights_digest,
    weights_of_a_pass,
)
from beagle.targets.head_transform import move_transform
from beagle.targets.layers import Layers, key_of, remember, remembered
from beagle.targets.linears import tiled
from beagle.targets.linears.packed import keep_read_linears, pack_linears
from beagle.targets.linears.quantized import BITS, check_kind, quantize_linears
from beagle.targets.lm_head import LMHead
from beagle.targets.passes import Passes
from beagle.targets.plan import EXACT_BLOCK, EXACT_TOKENS, of_exact_tree
from beagle.targets.runner import tap
from beagle.targets.shape import TreeShape


class Target(Passes):
    """Any Hugging Face causal LM whose layers go through transformers' attention interface.

    Its *hidden states* are the last ones after the final norm, so that ``logits(state)`` is the distribution of the
    next token (the paper's true states, §2); where draft heads read more layers, the outputs of those stand before them.

    Attributes:
        pass_weights: weights that a pass multiplies each token with: layers and LM head.
        pass_bytes: what they take in memory, read once a pass.
        digest: of the model's weights, however they are kept here.
        state_layers: numbers of the layers whose outputs are part of a hidden state.
        state_size: width of a hidden state, ``hidden_size`` for each of them and for the top one.
        context_ends: why it ends before the model's own context; empty where it does not.
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
            quantize: ``int8`` or ``int4`` linear layers beside an int8 LM head (see ``targets.linears.quantized``); the
                embedding, and the rows of the LM head that drafters and training read, keep their dtype.
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
        self.model, self.tokenizer, self.ranks, self.quantize = model, tokenizer, ranks, quantize
        self.config: Any = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
        self.head: nn.Module = move_transform(model)  # type: ignore[assignment]
        self.embed: nn.Module = model.get_input_embeddings()  # type: ignore[operator]
        limit, self.context_ends = context_limit(self.config)
        super().__init__(base_of(model), name, self.embed.weight, device_of(model), limit)
        rows = getattr(self.head, "weight", None)
        if isinstance(rows, Tensor):  # some embed more tokens than they answer with
            self.vocab_size = min(self.vocab_size, len(rows))
        refuse_planned_attention(self.device)
        self.eos_ids = eos_ids(model, tokenizer)
        model.eval().requires_grad_(False)
        self.digest = weights_digest(model)
        self._lm_head = LMHead(self.head, self.config, name, pack)
        self.pass_weights, self._weight_bytes = weights_of_a_pass(self.base, self.head, self.embed)
        self._of_head = rows.numel() if isinstance(rows, Tensor) else 0
        if quantize or pack:
            with probe.tokens_alone(name):
                keep_read_linears(self.base)
        self.unquantized = quantize_linears(self.base, quantize) if quantize else []  # layers whose shape can't be
        if quantize:
            in_layers = self.pass_weights - self._of_head
            self._weight_bytes = (in_layers * BITS[quantize] + self._of_head * BITS["int8"]) // 8
        if pack:
            pack_linears(self.base)
        self.layers = self._looked_at(probes)
        if self.layers.unscaled:
            self._lm_head = self._lm_head.without_scale()
        self.layer_count = len(self.layers.shapes)
        self.state_layers = tuple(state_layers)
        self.state_size = self.hidden_size * (len(self.state_layers) + 1)
        tap(self.base, self.state_layers, self.layer_count, name)
        self._shortened = pack and not quantize and self._lm_head.shorten()
        if quantize and not self._lm_head.quantize():  # after the probe, which compares with the model's own
            self.unquantized.append("LM head")

    def _looked_at(self, folder: Path | None) -> Layers:
        """The model's layers, as they were found at an earlier load or are found now."""
        model: Any = self.model
        if folder is None:
            return admit(self, model, self._lm_head)
        key = key_of(model, self.digest, self.quantize)
        found = remembered(folder, key)
        if found is None:
            found = admit(self, model, self._lm_head)
            remember(folder, key, found)
        else:
            if not found.own:
                model.set_attn_implementation(NAME)
            found.mark(self.base)
        return found

    @property
    def pass_bytes(self) -> int:
        """Of weights, that a greedy pass reads; our CPU kernel keeps bf16 weights in less than 16 bits."""
        packed = self.compiled is not None and self.quantize is None and tiled.used(self.dtype) is not None
        if not packed:
            return self._weight_bytes
        of_head = BITS["int8"] if self._shortened else tiled.HALF_BITS
        return ((self.pass_weights - self._of_head) * tiled.HALF_BITS + self._of_head * of_head) // 8

    @property
    def why_not_exact(self) -> str | None:
        """Why there are no exact passes; None: there are."""
        if self.chains_only:
            return "it keeps a recurrent state, whose bits depend on how many tokens share a pass"
        if self.device.type == "cuda" and self.dtype != torch.float32:
            return "in half precision on a GPU, exact passes were not always bit-equal when they were tried"
        return None

    def refuse_exact(self) -> None:
        """
        Raises:
            BeagleError: there are no exact passes of this target.
        """
        if why := self.why_not_exact:
            raise BeagleError(
                f"there is no exact mode for {self.name}: {why}; leave exact out, and load it with dtype float32 where "
                "near-ties matter"
            )

    @property
    def drafts_change_no_bit(self) -> bool:
        """Whether in any pass a token of a tree gets the bits that it would get alone."""
        return self.compiled is not None and self.compiled.runner.exact

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
        """A pass of ``count`` tokens, of which the first are given, or of these alone where any pass is exact."""
        if self.drafts_change_no_bit:
            return self.verify(cache, tokens, shape)
        plan = of_exact_tree(cache, shape, keys, count, self.layers.distinct_windows)
        return self.run(F.pad(tokens, (0, count - len(tokens)))[None], plan)[0, : len(tokens)]

    @cached_property
    def min_exact_tokens(self) -> int:
        """Tokens from which on a token's bits are the same however many share an exact pass, on this machine.

        Packed CPU kernels differ for a single token at most, which is tried out on a chain, for every number of tokens
        from two on. GPU libraries choose kernels by every size, that of the context too: all passes have ``EXACT_TOKENS``.
        """
        self.refuse_exact()
        if self.device.type == "cuda":
            return EXACT_TOKENS
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

    def likeliest(self, states: Tensor) -> tuple[list[float], list[int]]:
        """The largest logit of each of ``states [tokens, state_size]`` and the first token that has it."""
        return self._lm_head.likeliest(states[..., -self.hidden_size :])

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
