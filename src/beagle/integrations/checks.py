"""What ``generate`` may be asked for while drafting; the rest is refused by name, never answered otherwise."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from transformers import (
    EosTokenCriteria,
    GenerationConfig,
    LogitsProcessorList,
    MaxLengthCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
)
from transformers.generation import GenerationMode, logits_process

from beagle import hf
from beagle.errors import BeagleError
from beagle.integrations.hooks import hooks_and_replaced_functions

# those that look at each row alone and remember nothing, so that rows may come one after the other
_ROW_WISE = (
    logits_process.TemperatureLogitsWarper, logits_process.TopKLogitsWarper, logits_process.TopPLogitsWarper,
    logits_process.TopHLogitsWarper, logits_process.MinPLogitsWarper, logits_process.TypicalLogitsWarper,
    logits_process.EpsilonLogitsWarper, logits_process.EtaLogitsWarper, logits_process.LogitNormalization,
    logits_process.MinLengthLogitsProcessor, logits_process.MinNewTokensLengthLogitsProcessor,
    logits_process.RepetitionPenaltyLogitsProcessor, logits_process.NoRepeatNGramLogitsProcessor,
    logits_process.SequenceBiasLogitsProcessor, logits_process.NoBadWordsLogitsProcessor,
    logits_process.ForcedBOSTokenLogitsProcessor, logits_process.ForcedEOSTokenLogitsProcessor,
    logits_process.InfNanRemoveLogitsProcessor,
    logits_process.ExponentialDecayLengthPenalty, logits_process.SuppressTokensLogitsProcessor,
    logits_process.SuppressTokensAtBeginLogitsProcessor,
    MaxLengthCriteria, StopStringCriteria, EosTokenCriteria,
)  # fmt: skip


def _refuse(what: str, remedy: str) -> BeagleError:
    return BeagleError(f"{what} can't be drafted for; {remedy} (or speculate(…).remove() first)")


def refuse_arguments(given: Mapping[str, Any]) -> None:
    """Arguments of ``generate`` that choose another way of decoding, or a cache that ours can't stand in for."""
    for name in ("custom_generate", "assistant_model", "synced_gpus", "token_healing"):
        if given.get(name):
            raise _refuse(name, "leave it out")
    for name in sorted(hf.CACHE_NAMES):  # before transformers renames it
        if given.get(name) is not None:
            raise _refuse(f"{name} of an earlier call", "pass the whole text as input_ids")
    cache = given.get("cache_implementation")
    if cache in ("paged", "quantized") or str(cache).startswith("offloaded"):
        raise _refuse(f"cache_implementation='{cache}'", "leave it out")


def refuse_model(model: Any) -> None:
    """Refuse a model whose answers depend on more than its modules and weights, or that is not all here."""
    if model.training:
        raise _refuse("a model in training mode", "call model.eval()")
    for path, module in model.named_modules():
        if module.training and _differs_in_training(module):
            raise _refuse(f"{path} in training mode", "call model.eval()")
    if found := hooks_and_replaced_functions(model):
        raise _refuse(f"a model with code put into it ({found})", "take it out")
    if name := hf.attention_of_others(model.config):
        raise _refuse(
            f"attention '{name}', which isn't transformers' own", "call model.set_attn_implementation('sdpa')"
        )
    if len({str(device) for device in (getattr(model, "hf_device_map", None) or {}).values()}) > 1:
        raise _refuse("a model spread over several devices", "load it onto one")


def _differs_in_training(module: nn.Module) -> bool:
    """Whether a module is of those that drop something, or normalise by what they are shown; new ones are in
    training mode, adapters too, and most do the same in both."""
    if isinstance(module, nn.modules.batchnorm._BatchNorm):
        return True
    shares = [value for name, value in vars(module).items() if "dropout" in name and isinstance(value, float)]
    return any(shares) or (isinstance(module, nn.modules.dropout._DropoutNd) and module.p > 0)


def refuse_request(config: GenerationConfig, model_kwargs: Mapping[str, Any]) -> None:
    if (config.num_beams or 1) > 1:
        raise _refuse(f"num_beams={config.num_beams}", "use num_beams=1")
    mode = config.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise _refuse(f"decoding by '{mode.value}'", "use greedy decoding or sampling")
    for name, value in model_kwargs.items():
        empty = value is None or value is False or (isinstance(value, dict) and not value)
        if name not in hf.PREPARED_INPUTS | hf.CACHE_NAMES and not empty:
            raise _refuse(name, "leave it out")


def refuse_batch(
    config: GenerationConfig, processors: LogitsProcessorList, criteria: StoppingCriteriaList, streamer: Any
) -> None:
    """What means something else for several rows, which are answered one after the other."""
    if streamer is not None:
        raise _refuse("a streamer for several rows", "pass one prompt at a time")
    if config.return_dict_in_generate and (config.output_scores or config.output_logits):
        raise _refuse("output_scores or output_logits of several rows", "pass one prompt at a time")
    for part in (*processors, *criteria):
        if type(part) not in _ROW_WISE:
            raise _refuse(f"{type(part).__name__} for several rows", "pass one prompt at a time")
    if config._pad_token_tensor is None:
        raise _refuse("several rows without a pad_token_id", "pass pad_token_id=")


def unpadded(input_ids: Tensor, mask: Tensor | None, positions: Tensor | None) -> list[list[int]]:
    """The tokens of each row of ``[batch, n]`` without its padding at the left.

    Raises:
        BeagleError: there are no tokens, or masks or positions that padding at the left doesn't explain.
    """
    if not input_ids.shape[1]:
        raise _refuse("inputs_embeds without input_ids", "pass input_ids")
    seen = torch.ones_like(input_ids) if mask is None else mask.to(input_ids.device).long()
    if seen.shape != input_ids.shape or bool((seen.diff(dim=1) < 0).any()) or not bool(seen[:, -1].all()):
        raise _refuse("an attention_mask that hides more than padding at the left", "set padding_side='left'")
    if positions is not None:
        as_given = positions.to(input_ids.device) == seen.cumsum(1) - 1  # of each axis, where RoPE has several
        if not bool((as_given | (seen == 0)).all()):
            raise _refuse("position_ids of your own", "leave them out")
    return [row[hidden == 1].tolist() for row, hidden in zip(input_ids, seen, strict=True)]
