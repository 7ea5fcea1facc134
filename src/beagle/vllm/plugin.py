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
    others = SUPPORTED_SPECULATORS_TYPES.get(METHOD)

    def read(config_dict: dict[str, Any], pre_trained_config: dict[str, Any]) -> None:
        """Name the architecture in the part of a speculators config that becomes the draft's own."""
        if config_dict.get("speculators_config", {}).get("algorithm") == MODEL_TYPE:
            pre_trained_config["architectures"] = [f"Eagle{ARCHITECTURE}"]
        elif others is not None:
            others(config_dict=config_dict, pre_trained_config=pre_trained_config)
        else:
            raise ValueError(f"a speculators folder of type '{METHOD}' is for the algorithm '{MODEL_TYPE}' only")

    SUPPORTED_SPECULATORS_TYPES[METHOD] = read
