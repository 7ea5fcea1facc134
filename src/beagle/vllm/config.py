"""``config.json`` of an exported head, as vLLM and transformers read it."""

from __future__ import annotations

import json
from copy import copy
from pathlib import Path
from typing import Any

from transformers import PretrainedConfig

MODEL_TYPE = "beagle"
METHOD = "eagle"  # of vLLM: a chain from the target's last states
LAYERS_METHOD = "eagle3"  # a chain from outputs of several of its layers
ARCHITECTURE = "BeagleForCausalLM"  # vLLM puts "Eagle" before it for the first method, "Eagle3" for the second
LAYERS = "eagle_aux_hidden_state_layer_ids"  # where vLLM looks for their numbers


FIELDS: dict[str, Any] = {  # and their defaults
    "hidden_size": 1,
    "num_attention_heads": 1,
    "num_key_value_heads": 1,
    "head_dim": 1,
    "intermediate_size": 1,
    "vocab_size": 1,
    "max_position_embeddings": 1,
    "hidden_act": "silu",
    "rms_norm_eps": 1e-6,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
    "draft_vocab_size": None,
    "newest_state": "scale",
    "token_in_mlp": True,
    "embedding_scale": 1.0,
    "lm_head_bias": False,
    "num_hidden_layers": 1,
    LAYERS: None,
    "final_norm_eps": 1e-6,
}


def method_of(config: dict[str, Any]) -> str:
    """vLLM's method for the head of an exported ``config.json``."""
    return LAYERS_METHOD if config.get(LAYERS) else METHOD


def method_for(folder: str | Path) -> str:
    """The same of a folder that ``export`` wrote; of one that isn't there, which vLLM names, that of most heads."""
    try:
        return method_of(json.loads((Path(folder) / "config.json").read_text(encoding="utf-8")))
    except OSError:
        return METHOD


class BeagleDraftConfig(PretrainedConfig):
    """A Beagle head beside its target's shapes: ``FIELDS`` as attributes.

    The names that vLLM knows mean what they mean for Llama. Ours:

    Attributes:
        draft_vocab_size: tokens the head can draft; None is the target's whole vocabulary.
        newest_state: see ``drafters.head``.
        token_in_mlp: see ``drafters.head``.
        embedding_scale: what the target's embedding module multiplies its weights by (1 but for some Gemmas).
        lm_head_bias: whether the exported rows of the LM head have one.
        num_hidden_layers: the head's blocks.
        eagle_aux_hidden_state_layer_ids: numbers, from 1 on, of the target's layers whose outputs the head reads, the
            last of them the target's last; None: its state after the final norm alone.
        final_norm_eps: of the target's final norm, which is the head's to do where it reads layers.
    """

    model_type = MODEL_TYPE

    def __init__(self, **given: Any) -> None:
        if "head" in given:
            raise ValueError(
                "this folder is a head as `beagle train` wrote it; run `beagle export --to vllm DRAFT DIR` "
                "and give vLLM the folder DIR"
            )
        for name, default in FIELDS.items():
            setattr(self, name, given.pop(name, copy(default)))
        if self.newest_state not in ("none", "scale"):
            raise ValueError(f"newest_state is none or scale, not {self.newest_state!r}; export the head again")
        super().__init__(**given)
