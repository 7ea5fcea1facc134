"""What a model says of itself: whether it can be served, what ends an answer, what a pass reads."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import nn

from beagle.errors import BeagleError
from beagle.targets.devices import named_weights


def whole_of(model: Any) -> nn.Module:
    """A causal LM without its LM head."""
    base: nn.Module = model.base_model
    return getattr(model, "model", base) if base is model else base  # itself, where its class names another attribute


def base_of(model: Any) -> nn.Module:
    """A causal LM without its LM head, and without what sees or hears where it has that."""
    whole = whole_of(model)
    if model.config.get_text_config(decoder=True) is model.config:
        return whole
    text = getattr(whole, "language_model", None)
    return text if isinstance(text, nn.Module) else whole


def weights_of_a_pass(base: nn.Module, head: nn.Module, embed: nn.Module) -> tuple[int, int]:
    """Number and bytes of a pass's weights; embeddings are looked up, a row a token, and don't count."""
    looked_up = {id(parameter) for parameter in embed.parameters()}
    used = [p for p in base.parameters() if id(p) not in looked_up] + list(head.parameters())
    return sum(p.numel() for p in used), sum(p.numel() * p.element_size() for p in used)


def _parts(model: nn.Module) -> Iterator[tuple[str, torch.Tensor]]:
    """Weights by name; of those that quantised checkpoints make of several tensors each of these."""
    for name, weight in named_weights(model):
        if hasattr(weight, "__tensor_flatten__"):
            for part in weight.__tensor_flatten__()[0]:
                yield f"{name}.{part}", getattr(weight, part)
        else:
            yield name, weight


def weights_digest(model: nn.Module) -> str:
    """Tells models of one shape apart by up to 256 values of every weight; the same in every dtype that holds them."""
    digest = hashlib.sha256()
    for name, weight in _parts(model):
        values = weight.flatten()
        few = values[:: max(1, len(values) // 256)][:256].to("cpu", torch.bfloat16)
        digest.update(name.encode() + few.float().numpy().tobytes())
    return digest.hexdigest()[:16]


COMPRESSED = {"compressed_sparse_attention", "heavily_compressed_attention"}  # types of layers


def refuse_unsupported(config: Any, name: str) -> None:
    """Refuse, by config alone, what running a model would not show."""
    if getattr(config, "is_encoder_decoder", False):
        raise BeagleError(f"{name}: encoder-decoder models can't be served; choose a causal (decoder-only) LM")
    text = config.get_text_config(decoder=True)
    types = set(getattr(text, "layer_types", None) or ())
    what = ""
    if types & COMPRESSED:
        what = f"its layers ({_named(types & COMPRESSED)}) make one key of several tokens, which can't be cut back to fewer"
    elif not isinstance(getattr(text, "num_hidden_layers", None), int):
        what = f"a {text.model_type} is not one stack of layers"
    if what:
        raise BeagleError(f"{name}: {what}; choose a model with plain attention in every layer")


def _named(types: set[str]) -> str:
    return ", ".join(sorted(types))


def eos_ids(model: nn.Module, tokenizer: Any) -> frozenset[int]:
    """Every token that ends an answer, by the generation config, else config, else that of its text part, else tokenizer."""
    generation = getattr(model, "generation_config", None)
    text = model.config.get_text_config(decoder=True)  # type: ignore[operator, union-attr]
    for source in (generation, model.config, text, tokenizer):
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
    limit = int(getattr(config, "max_position_embeddings", None) or getattr(config, "max_seq_len", None) or 0)
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
