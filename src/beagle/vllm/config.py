"""``config.json`` of an exported head, as vLLM and transformers read it."""

from __future__ import annotations

from typing import Any

from transformers import PretrainedConfig

MODEL_TYPE = "beagle"
METHOD = "eagle"  # of vLLM: a chain from the target's last states
ARCHITECTURE = "BeagleForCausalLM"  # vLLM puts "Eagle" before it for this method


class BeagleDraftConfig(PretrainedConfig):
    """A Beagle head beside its target's shapes.

    The names that vLLM knows mean what they mean for Llama. Ours:

    Attributes:
        draft_vocab_size: tokens the head can draft; None is the target's whole vocabulary.
        newest_state, token_in_mlp: see ``drafters.head``. embedding_scale: what the target's embedding module
            multiplies its weights by (1 but for some Gemmas). lm_head_bias: of the exported rows.
    """

    model_type = MODEL_TYPE

    def __init__(
        self,
        hidden_size: int = 1,
        num_attention_heads: int = 1,
        num_key_value_heads: int = 1,
        head_dim: int = 1,
        intermediate_size: int = 1,
        vocab_size: int = 1,
        max_position_embeddings: int = 1,
        hidden_act: str = "silu",
        rms_norm_eps: float = 1e-6,
        rope_parameters: dict[str, Any] | None = None,
        draft_vocab_size: int | None = None,
        newest_state: str = "scale",
        token_in_mlp: bool = True,
        embedding_scale: float = 1.0,
        lm_head_bias: bool = False,
        **rest: Any,
    ) -> None:
        if "head" in rest:
            raise ValueError(
                "this folder is a head as `beagle train` wrote it; run `beagle export --to vllm DRAFT DIR` "
                "and give vLLM the folder DIR"
            )
        if newest_state not in ("none", "scale"):
            raise ValueError(f"newest_state is none or scale, not {newest_state!r}; export the head again")
        self.hidden_size = hidden_size
        self.num_hidden_layers = 1
        self.num_attention_heads = num_attention_heads
        self.num_key_value_heads = num_key_value_heads
        self.head_dim = head_dim
        self.intermediate_size = intermediate_size
        self.vocab_size = vocab_size
        self.max_position_embeddings = max_position_embeddings
        self.hidden_act = hidden_act
        self.rms_norm_eps = rms_norm_eps
        self.rope_parameters = rope_parameters or {"rope_type": "default", "rope_theta": 10_000.0}
        self.draft_vocab_size = draft_vocab_size
        self.newest_state = newest_state
        self.token_in_mlp = token_in_mlp
        self.embedding_scale = embedding_scale
        self.lm_head_bias = lm_head_bias
        rest.pop("num_hidden_layers", None)
        super().__init__(**rest)
