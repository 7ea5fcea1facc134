"""Names inside transformers that beagle relies on: asked of the installed library where it has them.

Each says in which version it was read; 5.17 to 5.24 are the versions that beagle is tested with.
"""

from __future__ import annotations

from typing import Any

from transformers import AttentionInterface as AttentionInterface
from transformers import AttentionMaskInterface as AttentionMaskInterface
from transformers.generation import utils as _generation
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.auto import modeling_auto as _auto

# Under which names `generate` takes a KV cache and hands it to the model.
# 5.17: past_key_values, cache_params, state, mems, past_buckets_states, all of them in ALL_CACHE_NAMES.
# 5.24: cache, which the first two are renamed to when they are passed, and the last three.
CACHE_NAMES = frozenset({*_generation.ALL_CACHE_NAMES, "cache", "past_key_values", "cache_params"})

# Inputs that `generate` prepares by itself, or that change how an answer is computed but not which (5.17, 5.24);
# the cache comes on top, and 5.24 passes attention_mask=None where nothing is masked.
PREPARED_INPUTS = frozenset({"attention_mask", "position_ids", "use_cache", "logits_to_keep"})

# Hooks that leave answers as they are: transformers' own, which stay on a model that was once asked for its hidden
# states, and those that let gradients reach the adapters of a frozen model (transformers' and peft's).
# 5.17 and 5.24: utils/output_capturing.py, modeling_utils.py: enable_input_require_grads; peft 0.21: utils/other.py
_HARMLESS_HOOKS = {
    "transformers.utils.output_capturing": "output_capturing_hook",
    "transformers.modeling_utils": "make_inputs_require_grads",
    "peft.utils.other": "make_inputs_require_grad",
}


def is_harmless(hook: Any) -> bool:
    """Whether a forward hook is one of the libraries' own that change no answer."""
    name = _HARMLESS_HOOKS.get(getattr(hook, "__module__", ""))
    return name is not None and getattr(hook, "__name__", "") == name


# Hooks that peft's generate puts on for one call, since rows or tokens of it take different adapters, and which it leaves
# there if that call fails (peft 0.21: tuners/lora/model.py).
_HOOKS_OF_ONE_CALL = {"_adapter_names_pre_forward_hook", "_alora_offsets_pre_forward_hook"}


def is_of_one_call(hook: Any) -> bool:
    """Whether a forward pre-hook chooses adapters for the ``generate`` that is under way."""
    function = getattr(hook, "func", hook)
    name = getattr(function, "__name__", "")
    return name in _HOOKS_OF_ONE_CALL and str(function.__module__).startswith("peft.")


# AttentionInterface: a layer calls the function registered under config._attn_implementation with (module, query, key,
# value, attention_mask, scaling=, dropout=, and where it has them sliding_window=, softcap=, s_aux=); 5.17 and 5.24.
# AttentionMaskInterface: the function under the same name makes attention_mask, from q_length, kv_length, mask_function
# and local_size; without one, the mask is None (masking_utils.py: _preprocess_mask_arguments; 5.17 and 5.24).


def own_attention(model: Any, ours: str) -> str:
    """The attention that a model computes with, or would, had ``ours`` not been set on it."""
    name = str(model.config._attn_implementation)
    if name != ours:
        return name
    return "sdpa" if getattr(model, "_supports_sdpa", False) else "eager"  # 5.17 and 5.24: PreTrainedModel


def can_set_attention(model: Any) -> bool:
    """Whether a model's modules take the attention function that its config names; where not, setting one warns."""
    return bool(type(model)._can_set_attn_implementation())  # 5.17 and 5.24: PreTrainedModel, by the module's source


def attention_of_others(config: Any) -> str | None:
    """The name of the attention that a model computes with, if transformers doesn't come with it."""
    # 5.17 and 5.24: eager stands in each modelling file; hub kernels are registered by transformers.integrations
    name = str(config._attn_implementation)
    function = None if name == "eager" else ALL_ATTENTION_FUNCTIONS.get(name)
    function = getattr(function, "func", function)
    if function is None or str(function.__module__).split(".")[0] == "transformers":
        return None
    return name


def auto_class(config: Any) -> Any | None:
    """What loads a language model of this config, alone or beside what sees and hears; None: transformers has no such."""
    # 5.17 and 5.24: models/auto/modeling_auto.py; auto_map names what code from a hub brings
    if (
        "AutoModelForCausalLM" in (getattr(config, "auto_map", None) or {})
        or type(config) in _auto.MODEL_FOR_CAUSAL_LM_MAPPING
    ):
        return _auto.AutoModelForCausalLM
    return _auto.AutoModelForImageTextToText if type(config) in _auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING else None
