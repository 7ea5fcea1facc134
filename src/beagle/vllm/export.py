"""From a head as ``beagle train`` writes it to a folder that vLLM loads as a draft model."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from beagle.drafters.block import Block
from beagle.drafters.head import BeagleHead
from beagle.errors import BeagleError
from beagle.files import replacing, write_json
from beagle.targets.target import Target
from beagle.vllm.config import ARCHITECTURE, METHOD, MODEL_TYPE

Format = Literal["vllm", "speculators"]
SPECULATORS_VERSION = "0.9.0"  # of the format


def export(
    head: Block,
    target: Target,
    folder: str | Path,
    *,
    to: Format = "vllm",
    depth: int = 5,
    verifier: str | None = None,
    embeddings: bool = False,
) -> None:
    """Write ``config.json`` and ``model.safetensors``, the config last.

    Args:
        to: what vLLM reads as a draft model, or the ``speculators`` format, whose folder names its target.
        depth: drafted tokens a step, and verifier: name of the target, that a ``speculators`` folder stands for.
        embeddings: with the target's embeddings, which vLLM needs under pipeline parallelism only.
    Raises:
        BeagleError: vLLM can't draft as this head does, or the folder can't be written.
    """
    if type(head) is not BeagleHead:  # what differs in a subclass, vLLM doesn't know
        raise BeagleError(
            f"a head of architecture '{head.architecture}' can't be exported; choose one trained with "
            "'architecture: beagle'"
        )
    if head.config.kv_layers or head.config.blocks > 1:
        raise BeagleError(
            "vLLM is not given more than a target's top state and one block: a head with kv_layers or blocks can't be "
            "exported; train one without"
        )
    folder = Path(folder)
    layer = layer_config(head, target)
    content = layer if to == "vllm" else speculators_config(layer, depth, verifier or target.name)
    tensors = weights(head, target, embeddings)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as partial:
            save_file(tensors, partial)
        write_json(folder / "config.json", content)
    except (OSError, SafetensorError) as error:
        raise BeagleError(f"cannot write '{folder}': {error}; free space or choose another folder") from error


def layer_config(head: BeagleHead, target: Target) -> dict[str, Any]:
    """Fields of ``vllm.config.BeagleDraftConfig``."""
    c = head.config
    _, bias = target.head_rows()
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "target": target.name,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": 1,
        "num_attention_heads": c.num_heads,
        "num_key_value_heads": c.num_kv_heads,
        "head_dim": c.head_dim,
        "intermediate_size": c.intermediate_size,
        "hidden_act": c.hidden_act,
        "rms_norm_eps": c.norm_eps,
        "rope_parameters": {"rope_type": "default", "rope_theta": c.rope_theta},
        "max_position_embeddings": target.context_limit,
        "vocab_size": c.target_vocab_size,
        "draft_vocab_size": c.draft_vocab_size,
        "newest_state": c.newest_state,
        "token_in_mlp": c.token_in_mlp,
        "embedding_scale": embedding_scale(target),
        "lm_head_bias": bias is not None and c.draft_vocab_size is not None,
        "tie_word_embeddings": False,
        "dtype": str(target.dtype).removeprefix("torch."),
    }


def speculators_config(layer: dict[str, Any], depth: int, verifier: str) -> dict[str, Any]:
    """The same in the ``speculators`` format; vLLM is given the folder as if it were the target."""
    method = {"proposal_type": "greedy", "speculative_tokens": depth, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["BeagleSpeculator"],
        "speculators_model_type": METHOD,  # vLLM takes it as its method
        "speculators_version": SPECULATORS_VERSION,
        "transformer_layer_config": layer,
        "speculators_config": {
            "algorithm": MODEL_TYPE,
            "default_proposal_method": "greedy",
            "proposal_methods": [method],
            "verifier": {"name_or_path": verifier, "architectures": []},
        },
        "beagle_version": version("beagle-decoding"),
    }


def weights(head: BeagleHead, target: Target, embeddings: bool) -> dict[str, Tensor]:
    """Tensors by the names of ``vllm.model``'s parameters, in the target's dtype."""
    state = head.state_dict()
    draft_vocab = state.pop("draft_vocab")
    # rms_norm(h) * newest is a norm with that weight, as of token
    if head.config.newest_state == "scale":
        state["newest_norm.weight"] = state.pop("newest")
    if head.config.token_in_mlp:
        state["token_norm.weight"] = state.pop("token")
    tensors = {f"model.{name}": tensor for name, tensor in state.items()}
    if head.config.draft_vocab_size is not None:
        rows, bias = target.head_rows(draft_vocab)
        tensors["lm_head.weight"] = rows
        if bias is not None:
            tensors["lm_head.bias"] = bias
    if embeddings:
        weight: Tensor = target.embed.weight  # type: ignore[assignment]
        tensors["model.embed_tokens.weight"] = weight
    cast = {name: tensor.detach().to("cpu", target.dtype).contiguous() for name, tensor in tensors.items()}
    if head.config.draft_vocab_size is not None:
        cast["draft_vocab"] = draft_vocab.cpu()
    return cast


@torch.no_grad()
def embedding_scale(target: Target) -> float:
    """What the target's embedding module multiplies its weights by; vLLM shares the weights alone.

    Raises:
        BeagleError: it does something else with them.
    """
    weight: Tensor = target.embed.weight  # type: ignore[assignment]
    ids = torch.arange(min(64, len(weight)), device=weight.device)
    plain, given = weight[ids].float(), target.embed(ids).float()
    scale = float((given * plain).sum() / plain.square().sum().clamp(min=1e-12))
    if abs(scale - 1.0) < 1e-3:
        scale = 1.0
    if not torch.allclose(given, plain * scale, rtol=0.02, atol=1e-6):
        raise BeagleError(f"{target.name}: its embeddings are more than scaled rows; vLLM can't share them with a head")
    return scale
