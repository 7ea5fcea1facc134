"""What a model says of itself: whether it can be served, what ends an answer, what a pass reads."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from beagle.errors import BeagleError


def weights_of_a_pass(base: nn.Module, head: nn.Module, embed: nn.Module) -> tuple[int, int]:
    """Number and bytes of a pass's weights; embeddings are looked up, a row a token, and don't count."""
    looked_up = {id(parameter) for parameter in embed.parameters()}
    used = [p for p in base.parameters() if id(p) not in looked_up] + list(head.parameters())
    return sum(p.numel() for p in used), sum(p.numel() * p.element_size() for p in used)


def weights_digest(model: nn.Module) -> str:
    """Tells models of one shape apart by up to 256 values of every weight; the same in every dtype that holds them."""
    digest = hashlib.sha256()
    for name, parameter in sorted(model.named_parameters()):
        values = parameter.detach().flatten()
        few = values[:: max(1, len(values) // 256)][:256].to("cpu", torch.bfloat16)
        digest.update(name.encode() + few.float().numpy().tobytes())
    return digest.hexdigest()[:16]


def refuse_unsupported(config: Any, name: str) -> None:
    """Refuse, by config alone, families that have no plain KV cache."""
    if getattr(config, "is_encoder_decoder", False):
        raise BeagleError(f"{name}: encoder-decoder models can't be served; choose a causal (decoder-only) LM")
    kinds = set(getattr(config, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    recurrent = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "bamba", "zamba"}
    if kinds or config.model_type in recurrent:
        what = ", ".join(sorted(kinds)) or config.model_type
        raise BeagleError(
            f"{name}: layers of kind '{what}' keep a recurrent or chunked state that can't be rolled back; "
            "choose a model with plain attention in every layer"
        )


def eos_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the generation config, else config, else tokenizer."""
    generation = getattr(model, "generation_config", None)
    for source in (generation, model.config, tokenizer):
        ids = getattr(source, "eos_token_id", None)
        if ids is not None:
            return frozenset(ids if isinstance(ids, list) else [ids])
    return frozenset()
