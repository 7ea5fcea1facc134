"""LoRA adapters of peft on a target: merged into its weights, so that everything after that is an ordinary model."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from beagle.errors import BeagleError
from beagle.targets.family import sample_ids
from beagle.targets.proof import TOLERANCE, difference

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_MERGE = "merge it yourself with peft (merge_and_unload, save_pretrained) and give the merged folder as the target"


def is_adapter(folder: Path) -> bool:
    """Whether a folder holds an adapter and no whole model."""
    return (folder / CONFIG).is_file() and not any(folder.glob("model*.safetensors"))


def refuse_no_adapter(folder: str | Path) -> None:
    """Find out before a model is loaded.

    Raises:
        BeagleError: the folder holds no adapter that can be merged, or peft isn't installed.
    """
    path = Path(folder)
    if not (path / CONFIG).is_file():
        raise BeagleError(f"adapter '{folder}': no {CONFIG} there; give a folder that peft's save_pretrained wrote")
    try:
        kind = json.loads((path / CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise BeagleError(f"adapter '{folder}': {CONFIG} is unreadable ({error}); copy it again") from error
    if kind != "LORA":
        raise BeagleError(f"adapter '{folder}' is of type {kind}, and LORA alone is merged; {_MERGE}")
    if not (path / WEIGHTS).is_file():
        raise BeagleError(f"adapter '{folder}': no {WEIGHTS} there; save it again as safetensors")
    try:
        import peft  # noqa: F401
    except ImportError as error:
        raise BeagleError(
            f"adapter '{folder}' needs the library peft: pip install 'beagle-decoding[adapter]'"
        ) from error


@torch.no_grad()
def merge_adapter(model: Any, folder: str | Path) -> Any:
    """The model with an adapter merged into its weights.

    Args:
        model: of transformers; changed in place.
        folder: of the adapter, looked at by ``refuse_no_adapter``.

    Raises:
        BeagleError: the adapter doesn't fit the model, or not all of it; or the merged model computes something else.
    """
    from peft import PeftModel, get_peft_model_state_dict

    path = Path(folder)
    try:
        with safe_open(path / WEIGHTS, framework="pt") as file:
            stored = set(file.keys())
        vocab_size = model.get_input_embeddings().weight.shape[0]
        with warnings.catch_warnings(action="ignore"):  # of what is looked at here
            adapted = PeftModel.from_pretrained(model, str(path)).eval()
        used = set(get_peft_model_state_dict(adapted, save_embedding_layers=False))
        if odd := sorted(stored ^ used):
            where = "its file alone" if odd[0] in stored else "the model alone"
            raise BeagleError(
                f"adapter '{folder}' doesn't fit the target: {odd[0]} is in {where}; give the model that it was trained "
                f"on, or {_MERGE}"
            )
        ids = sample_ids(model.config, vocab_size, 8)[None].to(model.device)
        expected = adapted(input_ids=ids).logits[0]
        merged = adapted.merge_and_unload(safe_merge=True)
        if not difference(merged(input_ids=ids).logits[0], expected) < TOLERANCE[model.dtype]:
            raise BeagleError(
                f"adapter '{folder}' is another model when it is merged: one of embeddings that share their weights with "
                f"the LM head, or one that depends on the tokens; untie the weights, or {_MERGE}"
            )
        return merged
    except (OSError, SafetensorError, ValueError, RuntimeError, TypeError, KeyError, AttributeError) as error:
        reason = [line.strip() for line in str(error).splitlines() if line.strip()][:2][-1:] or [type(error).__name__]
        raise BeagleError(
            f"adapter '{folder}' can't be merged into the target ({reason[0]}); give the model that it was trained on"
        ) from error
