"""What vLLM runs in each of its processes once this package is installed beside it."""

from __future__ import annotations

from typing import Any

from beagle.vllm.config import ARCHITECTURE, MODEL_TYPE, BeagleDraftConfig


def register() -> None:
    """Entry point of the group ``vllm.general_plugins``: make vLLM know Beagle heads."""
    from transformers import AutoConfig
    from vllm import ModelRegistry
    from vllm.transformers_utils.configs.speculators.algos import SUPPORTED_SPECULATORS_TYPES

    AutoConfig.register(MODEL_TYPE, BeagleDraftConfig, exist_ok=True)
    ModelRegistry.register_model(f"Eagle{ARCHITECTURE}", "beagle.vllm.model:EagleBeagleForCausalLM")
    SUPPORTED_SPECULATORS_TYPES[MODEL_TYPE] = _from_speculators


def _from_speculators(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
    """Name the architecture in the part of a speculators config that becomes the draft's own."""
    pre_trained_config["architectures"] = [ARCHITECTURE]
