"""What vLLM runs in each of its processes once this package is installed beside it."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

from beagle.vllm.config import ARCHITECTURE, LAYERS_METHOD, METHOD, MODEL_TYPE, BeagleDraftConfig

Reader = Callable[[dict[str, Any], dict[str, Any]], None]


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make vLLM know Beagle heads."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    AutoConfig.register(MODEL_TYPE, BeagleDraftConfig, exist_ok=True)
    for prefix, method in (("Eagle", METHOD), ("Eagle3", LAYERS_METHOD)):
        architecture = f"{prefix}{ARCHITECTURE}"
        ModelRegistry.register_model(architecture, f"beagle.vllm.model:{architecture}")
        # vLLM 0.32 has none of its own for the first; for the second, its own reads the heads that are not ours
        own = SUPPORTED_SPECULATORS_TYPES.get(method)
        SUPPORTED_SPECULATORS_TYPES[method] = partial(_read_speculators, architecture, own)
    # vLLM looks this one up, then loads another
    ModelRegistry.register_model(ARCHITECTURE, f"beagle.vllm.model:Eagle{ARCHITECTURE}")


def _read_speculators(
    architecture: str, own: Reader | None, config_dict: dict[str, Any], pre_trained_config: dict[str, Any]
) -> None:
    """Name the architecture in the part of a speculators config that becomes the draft's own."""
    algorithm = config_dict.get("speculators_config", {}).get("algorithm")
    if algorithm == MODEL_TYPE:
        pre_trained_config["architectures"] = [architecture]
    elif own is not None:
        own(config_dict, pre_trained_config)
    else:
        raise ValueError(f"the speculators algorithm '{algorithm}' is none that vLLM or Beagle can draft with")
