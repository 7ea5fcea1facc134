"""From a head as ``beagle train`` writes it to a folder that vLLM loads as a draft model."""

from __future__ import annotations

from contextlib import suppress
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn

from beagle.drafters.block import Block, setting
from beagle.drafters.head import BeagleHead
from beagle.errors import BeagleError
from beagle.files import replacing, write_json, writing_to
from beagle.targets.family import sample_ids
from beagle.targets.target import Target
from beagle.vllm.config import ARCHITECTURE, LAYERS, MODEL_TYPE, method_of

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
    folder = Path(folder)
    layer = layer_config(head, target)
    content = layer if to == "vllm" else speculators_config(layer, depth, verifier or target.name)
    tensors = weights(head, target, embeddings)
    with writing_to(folder, "free space or choose another folder"):
        folder.mkdir(parents=True, exist_ok=True)
        with replacing(folder / "model.safetensors") as partial:
            save_file(tensors, partial)
        write_json(folder / "config.json", content)


def layer_config(head: BeagleHead, target: Target) -> dict[str, Any]:
    """Fields of ``vllm.config.BeagleDraftConfig``."""
    c = head.config
    _, bias = target.head_rows()
    return {
        "model_type": MODEL_TYPE,
        "architectures": [ARCHITECTURE],
        "target": target.name,
        "hidden_size": c.hidden_size,
        "num_hidden_layers": c.blocks,
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
        LAYERS: [*c.kv_layers, target.layer_count] if c.kv_layers else None,
        "final_norm_eps": norm_eps(target),
        "tie_word_embeddings": False,
        "dtype": str(target.dtype).removeprefix("torch."),
    }


def speculators_config(layer: dict[str, Any], depth: int, verifier: str) -> dict[str, Any]:
    """The same in the ``speculators`` format; vLLM is given the folder as if it were the target."""
    method = {"proposal_type": "greedy", "speculative_tokens": depth, "verifier_accept_k": 1, "accept_tolerance": 0.0}
    return {
        "architectures": ["BeagleSpeculator"],
        "speculators_model_type": method_of(layer),  # vLLM takes it as its method
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
    if head.config.kv_layers:
        state["final_norm.weight"] = final_norm(target)
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


def norm_eps(target: Target) -> float:
    return float(setting(target.config, "rms_norm_eps") or 1e-6)


@torch.no_grad()
def top_norm(target: Target) -> tuple[nn.Module, tuple[Tensor, Tensor]]:
    """The module between the last layer and the top state, which vLLM's outputs of layers come before.

    Returns:
        The module; and what it was given and gave in a trial pass, ``[tokens, hidden]`` each.
    Raises:
        BeagleError: there is no such module.
    """
    ids = sample_ids(target.model.config, target.vocab_size, 12).to(target.device)
    norms = [m for m in target.base.children() if getattr(m, "weight", ids).shape == (target.hidden_size,)]
    seen: list[tuple[Tensor, Tensor]] = []
    hooks = [norm.register_forward_hook(lambda norm, given, out: seen.append((given[0], out))) for norm in norms]
    try:
        top = target.prefill(ids[None], target.new_cache(1, 64))[0, :, -target.hidden_size :]
    finally:
        for hook in hooks:
            hook.remove()
    if len(norms) == len(seen) == 1 and torch.equal(seen[0][1][0], top):
        return norms[0], (seen[0][0][0], seen[0][1][0])
    raise BeagleError(f"{target.name}: its top state is no norm of the last layer's output, which is what vLLM gives")


@torch.no_grad()
def final_norm(target: Target) -> Tensor:
    """Weight ``[hidden]`` of the target's final norm; beside other layers' outputs vLLM gives the last one's before it.

    Raises:
        BeagleError: it is no RMS norm.
    """
    with suppress(BeagleError):
        norm, (given, top) = top_norm(target)
        weight: Tensor = norm(torch.full_like(top[:1], 1000.0))[0]  # normed to ones
        ours = F.rms_norm(given.float(), top.shape[-1:], weight.float(), norm_eps(target))
        if torch.allclose(ours, top.float(), rtol=0.02, atol=1e-3 * float(top.float().abs().max())):
            return weight
    raise BeagleError(
        f"{target.name}: its final norm is no RMS norm, which vLLM leaves to heads that read several layers; "
        "train a head without kv_layers"
    )
