"""The Beagle head for vLLM, from its tensor-parallel layers; the same arithmetic as ``drafters.head``.

vLLM calls it as an EAGLE draft model: slot i gets the token t_{i+1}, the position i and the target's
state h_i after its final norm; what it returns stands in for h_{i+1} and is fed back for the next
slot. After verification vLLM runs it on the hidden states, over the keys of the predicted ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from vllm.compilation.decorators import support_torch_compile
from vllm.config import VllmConfig
from vllm.distributed import get_pp_group, get_tensor_model_parallel_world_size
from vllm.logger import init_logger
from vllm.model_executor.layers.activation import get_act_fn
from vllm.model_executor.layers.attention import Attention
from vllm.model_executor.layers.layernorm import RMSNorm
from vllm.model_executor.layers.linear import (
    ColumnParallelLinear,
    MergedColumnParallelLinear,
    QKVParallelLinear,
    RowParallelLinear,
)
from vllm.model_executor.layers.logits_processor import LogitsProcessor
from vllm.model_executor.layers.rotary_embedding import get_rope
from vllm.model_executor.layers.vocab_parallel_embedding import (
    DEFAULT_VOCAB_PADDING_SIZE,
    ParallelLMHead,
    VocabParallelEmbedding,
)
from vllm.model_executor.model_loader.weight_utils import default_weight_loader

from beagle.vllm.greedy import WARNING, sampling_is_broken

logger = init_logger("vllm.beagle")  # vLLM shows loggers below its own name

EMBEDDINGS = "model.embed_tokens.weight"
SHARDS: dict[str, tuple[str, str | int]] = {  # weights of a checkpoint that vLLM keeps in one matrix
    "k_proj": ("kv_proj", "k"),
    "v_proj": ("kv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0, "inputs_embeds": 0}  # the tokens
)
class BeagleBlock(nn.Module):
    """One cross-attention block: queries from embeddings, keys and values from states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        d, eps = config.hidden_size, config.rms_norm_eps
        parallel = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads // parallel
        kv_heads = max(1, config.num_key_value_heads // parallel)
        self.kv_size = kv_heads * config.head_dim
        self.embedding_scale = float(config.embedding_scale)
        # replaced by the target's, but where pipeline parallelism keeps that on another rank
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, d, prefix=f"{prefix}.embed_tokens")
        self.embedding_norm = RMSNorm(d, eps=eps)
        self.state_norm = RMSNorm(d, eps=eps)
        self.q_proj = ColumnParallelLinear(
            d, config.num_attention_heads * config.head_dim, bias=False, prefix=f"{prefix}.q_proj"
        )
        self.kv_proj = QKVParallelLinear(
            d, config.head_dim, 0, config.num_key_value_heads, bias=False, prefix=f"{prefix}.kv_proj"
        )
        self.o_proj = RowParallelLinear(
            config.num_attention_heads * config.head_dim, d, bias=False, prefix=f"{prefix}.o_proj"
        )
        self.rotary = get_rope(
            config.head_dim, max_position=config.max_position_embeddings, rope_parameters=config.rope_parameters
        )
        cache = copy.copy(vllm_config.cache_config)
        cache.sliding_window = None  # the target's; the head sees everything
        layer = vllm_config.model_config.get_total_num_hidden_layers()  # a name that no layer of the target has
        self.attention = Attention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache,
            prefix=f"{prefix}.layers.{layer}.attention",
        )
        self.newest_state = config.newest_state
        if self.newest_state != "none":
            self.newest_norm = RMSNorm(d, eps=eps)  # its weight is the head's scale
        self.token_in_mlp = config.token_in_mlp
        if self.token_in_mlp:
            self.token_norm = RMSNorm(d, eps=eps)  # its weight is the head's scale, too
        self.mlp_norm = RMSNorm(d, eps=eps)
        self.gate_up_proj = MergedColumnParallelLinear(
            d, [config.intermediate_size] * 2, bias=False, prefix=f"{prefix}.gate_up_proj"
        )
        self.activation = get_act_fn(config.hidden_act)
        self.down_proj = RowParallelLinear(config.intermediate_size, d, bias=False, prefix=f"{prefix}.down_proj")

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings = self.embed_tokens(input_ids)
        return embeddings * self.embedding_scale if self.embedding_scale != 1.0 else embeddings

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Predicted states ``[tokens, hidden]`` of slots; ``hidden_states`` are those before them."""
        embeddings = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        q, _ = self.q_proj(self.embedding_norm(embeddings))
        kv, _ = self.kv_proj(self.state_norm(hidden_states))
        k, v = kv.split(self.kv_size, dim=-1)
        q, k = self.rotary(positions, q, k)
        attended, _ = self.o_proj(self.attention(q, k, v))
        y = attended + embeddings
        if self.newest_state != "none":
            y = y + self.newest_norm(hidden_states)
        x = self.mlp_norm(y)
        if self.token_in_mlp:
            x = x + self.token_norm(embeddings)
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        x, _ = self.down_proj(self.activation(gate) * up)
        return y + x


class EagleBeagleForCausalLM(nn.Module):
    """What vLLM loads for the architecture ``BeagleForCausalLM`` with the method ``eagle``.

    The target's embeddings are shared. So is its LM head where the head drafts from the whole
    vocabulary; a trimmed one brings its rows.
    """

    has_own_embed_tokens = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__()
        config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        self.model = BeagleBlock(vllm_config=vllm_config, prefix=f"{prefix}.beagle".lstrip("."))
        self.has_own_lm_head = config.draft_vocab_size is not None
        size = config.draft_vocab_size or config.vocab_size
        if self.has_own_lm_head:
            self.lm_head = ParallelLMHead(
                size,
                config.hidden_size,
                bias=config.lm_head_bias,
                # equal parts for any number of workers; the processor cuts the padding's logits off
                padding_size=DEFAULT_VOCAB_PADDING_SIZE * get_tensor_model_parallel_world_size(),
                prefix="beagle.lm_head",
            )
            self.draft_vocab = nn.Parameter(torch.arange(size), requires_grad=False)  # draft id -> target id
        self.logits_processor = LogitsProcessor(size)
        if sampling_is_broken():
            logger.warning(WARNING)

    def embed_input_ids(self, input_ids: Tensor) -> Tensor:
        return self.model.embed(input_ids)

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """States for the logits, and states fed back for the next slot: the same ``[tokens, hidden]``."""
        states = self.model(input_ids, positions, hidden_states, inputs_embeds)
        return states, states

    def compute_logits(self, hidden_states: Tensor) -> Tensor | None:
        """``[n, hidden]`` to ``[n, vocabulary of the target]``; what can't be drafted is -inf."""
        logits = self.logits_processor(self.lm_head, hidden_states, getattr(self.lm_head, "bias", None))
        if logits is None or not self.has_own_lm_head:
            return logits
        whole = logits.new_full((len(logits), self.config.vocab_size), float("-inf"))
        whole[:, self.draft_vocab] = logits
        return whole

    def load_weights(self, weights: Iterable[tuple[str, Tensor]]) -> set[str]:
        """
        Raises:
            ValueError: a weight is missing or unknown.
        """
        parameters = dict(self.named_parameters())
        shared = {EMBEDDINGS} if get_pp_group().world_size == 1 else set()
        loaded: set[str] = set()
        for name, weight in weights:
            if name in shared:
                continue
            *path, module, kind = f".{name}".split(".")
            ours, shard = SHARDS.get(module, (module, None))
            full = ".".join([*path, ours, kind]).lstrip(".")
            if full not in parameters:
                raise ValueError(f"the draft checkpoint has an unknown weight '{name}'; it needs a newer beagle")
            parameter = parameters[full]
            load = getattr(parameter, "weight_loader", default_weight_loader)
            load(parameter, weight) if shard is None else load(parameter, weight, shard)
            loaded.add(full)
        missing = set(parameters) - loaded - shared
        if missing == {EMBEDDINGS}:
            raise ValueError("pipeline parallelism needs the target's embeddings; export the head with --embeddings")
        if missing:
            raise ValueError(f"the draft checkpoint lacks {min(missing)}; export it again")
        return loaded | shared
