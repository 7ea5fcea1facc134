"""What is taken from a model's generation config: the tokens that end an answer, and nothing else."""

from __future__ import annotations

import reprlib
from collections.abc import Collection
from typing import Any

from transformers import GenerationConfig

# settings with which transformers' greedy answers are others than the likeliest tokens', and their neutral values
CHANGES: dict[str, Any] = {
    "repetition_penalty": 1,
    "no_repeat_ngram_size": 0,
    "bad_words_ids": None,
    "sequence_bias": None,
    "suppress_tokens": None,
    "begin_suppress_tokens": None,
    "forced_bos_token_id": None,
    "forced_eos_token_id": None,
    "min_length": 0,
    "min_new_tokens": 0,
    "exponential_decay_length_penalty": None,
    "guidance_scale": 1,
    "watermarking_config": None,
    "stop_strings": None,
    "max_time": None,
    "num_beams": 1,
    "num_beam_groups": 1,
    "penalty_alpha": None,
    "dola_layers": None,
    "token_healing": False,
    "encoder_repetition_penalty": 1,
    "encoder_no_repeat_ngram_size": 0,
    "constraints": None,
    "force_words_ids": None,
}


def left_out(config: GenerationConfig | None) -> list[str]:
    """Settings of a model's generation config that would change greedy answers, as ``name=value``."""
    found = []
    for name, neutral in CHANGES.items():
        value = getattr(config, name, None)
        if value is not None and value != neutral and value != []:
            found.append(f"{name}={reprlib.repr(value)}")
    return found


def neutral(config: GenerationConfig, eos_ids: Collection[int]) -> GenerationConfig:
    """The generation config with which transformers decodes by the options that it is called with alone.

    How an assistant drafts stays.
    """
    drafts = {name: value for name, value in vars(config).items() if "assistant" in name}
    return GenerationConfig(
        **drafts,
        bos_token_id=config.bos_token_id,
        eos_token_id=sorted(eos_ids) or None,
        pad_token_id=config.pad_token_id,
    )
