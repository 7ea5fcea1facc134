"""What vLLM runs in each of its processes once this package is installed beside it."""

from __future__ import annotations

from typing import Any

from beagle.vllm.config import ARCHITECTURE, METHOD, MODEL_TYPE, BeagleDraftConfig


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make vLLM know Beagle heads."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    AutoConfig.register(MODEL_TYPE, BeagleDraftConfig, exist_ok=True)
    for name in (ARCHITECTURE, f"Eagle{ARCHITECTURE}"):  # it looks up the one, then loads the other
        ModelRegistry.register_model(name, "beagle.vllm.model:EagleBeagleForCausalLM")
    SUPPORTED_SPECULATORS_TYPES[METHOD] = _read_speculators  # vLLM 0.32 has none of its own for this method


def _read_speculators(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Name the architecture in the part of a speculators config that becomes the draft's own."""
    algorithm = config_dict.get("speculators_config", {}).get("algorithm")
    if algorithm != MODEL_TYPE:
        raise ValueError(f"the speculators algorithm '{algorithm}' is none that vLLM or Beagle can draft with")
    pre_trained_config["architectures"] = [f"Eagle{ARCHITECTURE}"]
