"""The Beagle head for vLLM, from its tensor-parallel layers; the same arithmetic as ``drafters.head``.

vLLM calls it as an EAGLE draft model: slot i gets the token t_{i+1}, the position i and the target's state h_i after its
final norm, or outputs of several layers that ``fuse`` makes one of. What it returns stands in for h_{i+1} and is fed back
for the next slot. After verification vLLM runs it on the hidden states, over the keys of the predicted ones.
"""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
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
    ReplicatedLinear,
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
from vllm.model_executor.models.llama_eagle3 import Eagle3LlamaForCausalLM

from beagle.vllm.greedy import WARNING, sampling_is_broken

logger = init_logger("vllm.beagle")  # vLLM shows loggers below its own name

EMBEDDINGS = "model.embed_tokens.weight"
SHARDS: dict[str, tuple[str, str | int]] = {  # weights of a checkpoint that vLLM keeps in one matrix
    "k_proj": ("kv_proj", "k"),
    "v_proj": ("kv_proj", "v"),
    "gate_proj": ("gate_up_proj", 0),
    "up_proj": ("gate_up_proj", 1),
}


def divisible(size: int) -> int:
    """The next number up from ``size`` that the workers of tensor parallelism divide."""
    workers: int = get_tensor_model_parallel_world_size()
    return -(-size // workers) * workers


class Layer(nn.Module):
    """One attention over keys and values of hidden states, and an MLP."""

    def __init__(self, vllm_config: VllmConfig, number: int, prefix: str) -> None:
        """
        Args:
            vllm_config: the target's, the head's in its ``speculative_config``.
            number: of this block of the head, from 0 on.
        """
        super().__init__()
        config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        d, eps = config.hidden_size, config.rms_norm_eps
        parallel = get_tensor_model_parallel_world_size()
        heads = config.num_attention_heads // parallel
        kv_heads = max(1, config.num_key_value_heads // parallel)
        self.kv_size = kv_heads * config.head_dim
        # a name that no layer of the target has
        prefix = f"{prefix}.layers.{vllm_config.model_config.get_total_num_hidden_layers() + number}"
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
        self.attention = Attention(
            heads,
            config.head_dim,
            config.head_dim**-0.5,
            num_kv_heads=kv_heads,
            cache_config=cache,
            prefix=f"{prefix}.attention",
        )
        self.mlp_norm = RMSNorm(d, eps=eps)
        inner = divisible(config.intermediate_size)
        self.gate_up_proj = MergedColumnParallelLinear(d, [inner] * 2, bias=False, prefix=f"{prefix}.gate_up_proj")
        self.activation = get_act_fn(config.hidden_act)
        self.down_proj = RowParallelLinear(inner, d, bias=False, prefix=f"{prefix}.down_proj")

    def attend(self, x: Tensor, states: Tensor, positions: Tensor) -> Tensor:
        """Attention of normed ``x`` over hidden states, those of the slots before too; all ``[tokens, hidden]``."""
        q, _ = self.q_proj(x)
        kv, _ = self.kv_proj(self.state_norm(states))
        k, v = kv.split(self.kv_size, dim=-1)
        q, k = self.rotary(positions, q, k)
        attended, _ = self.o_proj(self.attention(q, k, v))
        return attended

    def feed_forward(self, y: Tensor, x: Tensor) -> Tensor:
        """MLP(x) + y."""
        gate, up = self.gate_up_proj(x)[0].chunk(2, dim=-1)
        x, _ = self.down_proj(self.activation(gate) * up)
        return y + x


class FurtherBlock(Layer):
    """A block behind the first: queries from what the one before it made."""

    def __init__(self, vllm_config: VllmConfig, number: int, prefix: str) -> None:
        super().__init__(vllm_config, number, prefix)
        config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        self.query_norm = RMSNorm(config.hidden_size, eps=config.rms_norm_eps)

    def forward(self, x: Tensor, states: Tensor, positions: Tensor) -> Tensor:
        y = self.attend(self.query_norm(x), states, positions) + x
        return self.feed_forward(y, self.mlp_norm(y))


@support_torch_compile(
    dynamic_arg_dims={"input_ids": 0, "positions": -1, "hidden_states": 0, "inputs_embeds": 0}  # the tokens
)
class BeagleBlocks(Layer):
    """The first block, queries from embeddings, and those behind it; keys and values of all are made of the states."""

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        super().__init__(vllm_config, 0, prefix)
        config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        d, eps = config.hidden_size, config.rms_norm_eps
        self.embedding_scale = float(config.embedding_scale)
        # replaced by the target's, but where pipeline parallelism keeps that on another rank
        self.embed_tokens = VocabParallelEmbedding(config.vocab_size, d, prefix=f"{prefix}.embed_tokens")
        self.embedding_norm = RMSNorm(d, eps=eps)
        self.newest_state = config.newest_state
        if self.newest_state != "none":
            self.newest_norm = RMSNorm(d, eps=eps)  # its weight is the head's scale
        self.token_in_mlp = config.token_in_mlp
        if self.token_in_mlp:
            self.token_norm = RMSNorm(d, eps=eps)  # its weight is the head's scale, too
        self.further = nn.ModuleList(FurtherBlock(vllm_config, i, prefix) for i in range(1, config.num_hidden_layers))
        if layers := config.eagle_aux_hidden_state_layer_ids:
            self.layer_norms = nn.ModuleList(RMSNorm(d, eps=eps) for _ in layers[:-1])
            self.layer_proj = ReplicatedLinear(d * (len(layers) - 1), d, bias=False, prefix=f"{prefix}.layer_proj")
            self.final_norm = RMSNorm(d, eps=config.final_norm_eps)

    def embed(self, input_ids: Tensor) -> Tensor:
        embeddings = self.embed_tokens(input_ids)
        return embeddings * self.embedding_scale if self.embedding_scale != 1.0 else embeddings

    def fuse(self, states: Tensor) -> Tensor:
        """The target's states as the head reads them, ``[tokens, hidden]``.

        Args:
            states: outputs of the layers that the config names, the last of them the target's last: ``[tokens, layers *
                hidden]``.
        Raises:
            RuntimeError: the target, as vLLM has it, hands over fewer.
        """
        d, count = self.final_norm.weight.shape[0], len(self.layer_norms) + 1
        if states.shape[-1] != d * count:
            raise RuntimeError(
                f"the head reads {count} layers of the target, of which vLLM hands over {states.shape[-1] // d}; "
                "train a head without kv_layers for this target"
            )
        *parts, last = (part.contiguous() for part in states.split(d, dim=-1))
        normed = [norm(part) for norm, part in zip(self.layer_norms, parts, strict=True)]
        taken, _ = self.layer_proj(torch.cat(normed, dim=-1))
        return self.final_norm(last) + taken

    def forward(
        self, input_ids: Tensor, positions: Tensor, hidden_states: Tensor, inputs_embeds: Tensor | None = None
    ) -> Tensor:
        """Predicted states ``[tokens, hidden]`` of slots; ``hidden_states`` are those before them."""
        embeddings = self.embed(input_ids) if inputs_embeds is None else inputs_embeds
        y = self.attend(self.embedding_norm(embeddings), hidden_states, positions) + embeddings
        if self.newest_state != "none":
            y = y + self.newest_norm(hidden_states)
        x = self.mlp_norm(y)
        if self.token_in_mlp:
            x = x + self.token_norm(embeddings)
        y = self.feed_forward(y, x)
        for block in self.further:
            y = block(y, hidden_states, positions)
        return y


class EagleBeagleForCausalLM(nn.Module):
    """What vLLM loads for the architecture ``BeagleForCausalLM`` with the method ``eagle``.

    The target's embeddings are shared. So is its LM head where the head drafts from the whole
    vocabulary; a trimmed one brings its rows.
    """

    has_own_embed_tokens = False

    def __init__(self, *, vllm_config: VllmConfig, prefix: str = "") -> None:
        nn.Module.__init__(self)  # of a further base class, below, nothing is wanted
        config: Any = vllm_config.speculative_config.draft_model_config.hf_config
        self.config = config
        self.model = BeagleBlocks(vllm_config=vllm_config, prefix=f"{prefix}.beagle".lstrip("."))
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
            if module in ("gate_proj", "up_proj", "down_proj"):  # zeros where workers don't divide it add nothing
                inner = int(module == "down_proj")
                missing_rows = divisible(weight.shape[inner]) - weight.shape[inner]
                weight = F.pad(weight, (0, missing_rows) if inner else (0, 0, 0, missing_rows))
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


class Eagle3BeagleForCausalLM(EagleBeagleForCausalLM, Eagle3LlamaForCausalLM):
    """The same with the method ``eagle3``, which hands over outputs of several layers.

    vLLM takes no other classes for this method than its own and what is derived from them; all is overridden.
    """

    def combine_hidden_states(self, hidden_states: Tensor) -> Tensor:
        """Outputs of the layers that the config names, side by side, to ``[tokens, hidden]``."""
        return self.model.fuse(hidden_states)

    def get_top_tokens(self, hidden_states: Tensor) -> Tensor:
        """Best tokens of the target's vocabulary."""
        logits = self.compute_logits(hidden_states)
        assert logits is not None
        return logits.argmax(dim=-1)
