"""What a model says of itself: whether it can be served, what ends an answer, what a pass reads."""

from __future__ import annotations

import hashlib
from typing import Any

import torch
from torch import nn

from beagle.errors import BeagleError

# by which states may differ from the model's own, as a share of their size (see ``difference``): rounding only
TOLERANCE = {torch.float32: 1e-3, torch.float16: 0.01, torch.bfloat16: 0.05}


def base_of(model: Any) -> nn.Module:
    """A causal LM without its LM head."""
    base: nn.Module = model.base_model
    return getattr(model, "model", base) if base is model else base  # itself, where its class names another attribute


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
    text = config.get_text_config(decoder=True)
    kinds = set(getattr(text, "layer_types", None) or ()) - {"full_attention", "sliding_attention"}
    recurrent = {"mamba", "mamba2", "falcon_mamba", "rwkv", "recurrent_gemma", "xlstm", "jamba", "bamba", "zamba"}
    if kinds or text.model_type in recurrent:
        what = ", ".join(sorted(kinds)) or text.model_type
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


def context_limit(config: Any) -> tuple[int, str]:
    """Most tokens of a prompt and its answer, and why it is fewer than the config's own limit ("" where it isn't).

    LongRoPE turns every token's keys by other factors once the text is longer than what the model was first trained
    on. Drafts, batches and single tokens would each meet that at another moment, so the context ends there.

    Args:
        config: of the text model.
    """
    limit = int(getattr(config, "max_position_embeddings", None) or 0)
    limit = limit if limit > 0 else 2**31
    rope = getattr(config, "rope_parameters", None) or {}
    parts = [rope, *(part for part in rope.values() if isinstance(part, dict))]  # one for each type of layers
    for part in parts:
        if part.get("rope_type") == "longrope" and part.get("short_factor") != part.get("long_factor"):
            original = part.get("original_max_position_embeddings")
            switch = int(original or getattr(config, "original_max_position_embeddings", None) or limit)
            if switch < limit:
                return (
                    switch,
                    f"its RoPE (longrope) turns earlier tokens otherwise in texts of more than {switch} tokens",
                )
    return limit, ""


def sample_ids(config: Any, vocab_size: int, n: int) -> torch.Tensor:
    """Token ids ``[n]`` to try a model with: seeded, none of them special to its config."""
    special = set()
    for part in (config, config.get_text_config(decoder=True)):
        for key, value in part.to_dict().items():
            if key.endswith(("token_id", "token_ids", "token_index")):
                special |= set(value) if isinstance(value, list) else {value}
    most = min(vocab_size, 5000)
    plain = torch.tensor([i for i in range(most) if i not in special] or [0])
    random = torch.Generator().manual_seed(0)
    return plain[torch.randint(len(plain), (n,), generator=random)]


def difference(states: torch.Tensor, expected: torch.Tensor) -> float:
    """How far hidden states ``[n, hidden]`` are from others, as a share of their size.

    In fp32 that of the worst token. In half precision the median token's: rounding may send a single token to
    another expert, while a wrong mask, position or scale moves most of them.
    """
    gaps = (states.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    if gaps.isnan().any():
        return float("nan")
    return float(gaps.max() if expected.dtype == torch.float32 else gaps.median())


def refuse_difference(states: torch.Tensor, expected: torch.Tensor, what: str, name: str) -> None:
    """
    Args:
        states: ``[n, hidden]`` of one kind of pass.
        expected: the model's own.
        what: names the kind.
        name: of the target.
    Raises:
        BeagleError: they differ by more than rounding.
    """
    gap = difference(states, expected)
    if not gap < TOLERANCE[expected.dtype]:  # also catches NaN
        raise BeagleError(
            f"{name}: {what} gives other hidden states here than in the model itself (by {gap:.2g} of their "
            "size), so this family keeps a state or a mask that can't be served; choose a model with plain "
            "attention in every layer"
        )
