"""Whether a model can be served: what its layers cache and see is learned, and every kind of pass must prove itself."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from beagle.errors import BeagleError
from beagle.hf import own_attention
from beagle.targets import probe, proof
from beagle.targets.attention import NAME
from beagle.targets.counting import give_positions
from beagle.targets.family import sample_ids, whole_of
from beagle.targets.layers import Layers
from beagle.targets.lm_head import LMHead
from beagle.targets.passes import Passes
from beagle.targets.plan import span


@torch.no_grad()
def admit(passes: Passes, model: Any, lm_head: LMHead) -> Layers:
    """Learn what a model's layers cache and see, and that its passes give what the model itself gives.

    Args:
        passes: of the model; they have its layers afterwards.
        model: a causal LM of transformers, which has our attention afterwards.
        lm_head: its LM head, with the scale and soft cap of its config.
    Raises:
        BeagleError: it computes something that can't be served.
    """
    name = passes.name
    own = own_attention(model, NAME)
    layers = probe.learn(model, name, int(model.config.get_text_config(decoder=True).num_hidden_layers))
    if not layers.own:
        model.set_attn_implementation(own)
    spans = [span(window) or 0 for window in layers.distinct_windows]
    finite = [tokens for tokens in spans if tokens <= probe.MOST_WINDOW]
    n = min(max(finite, default=0) + probe.TOKENS, passes.context_limit)
    ids = sample_ids(model.config, passes.vocab_size, n).to(passes.device)
    whole = whole_of(model)
    few = ids[None, : min(n, 12)]
    with probe.tokens_alone(name):
        expected: Tensor = whole(input_ids=ids[None], use_cache=False)[0][0].to(passes.dtype)
        logits = model(input_ids=few, use_cache=False).logits
    if not layers.own:
        model.set_attn_implementation(NAME)
    passes.layers = layers
    try:
        with probe.tokens_alone(name):
            _prove(passes, model, ids, expected, own)
    except proof.Different as error:
        expected, logits = _given_positions(passes, model, ids, few, expected, own, error)
    states = expected[: few.shape[1]]  # causal, so that no pass of the few alone is needed
    return replace(passes.layers, unscaled=_is_unscaled(passes, lm_head, states, logits[0]))


def _given_positions(
    passes: Passes, model: Any, ids: Tensor, few: Tensor, expected: Tensor, own: str, error: proof.Different
) -> tuple[Tensor, Tensor]:
    """Compare once more where the model alone numbers its tokens otherwise than from 0 on, as its ``generate`` does.

    Args:
        ids: ``[n]``.
        few: the first of them, ``[1, few]``.
        expected: the model's states of ``ids`` where it is given no positions.
        error: what the comparison came to.
    Returns:
        The model's own states of ``ids`` and logits of ``few`` at the positions that its ``generate`` gives.
    """
    if not passes.layers.own:
        model.set_attn_implementation(own)
    if passes.chains_only:
        raise error
    states = proof.at_positions(model, whole_of(model), ids, expected)
    if states is None and passes.layers.own and give_positions(passes.base):
        passes.layers = replace(passes.layers, counted=True)
        with probe.tokens_alone(passes.name):
            _prove(passes, model, ids, expected, own)
        return expected, model(input_ids=few, use_cache=False).logits
    if states is None:
        raise BeagleError(
            f"{passes.name}: it numbers its tokens in a way of its own, so that those of a draft can't be given their "
            "positions; choose a model that takes position_ids"
        ) from error
    if proof.difference(states, expected) < proof.TOLERANCE[passes.dtype]:
        raise error
    logits: Tensor = model(input_ids=few, use_cache=False, **proof.given_positions(model, few[0])).logits
    if not passes.layers.own:
        model.set_attn_implementation(NAME)
    with probe.tokens_alone(passes.name):
        _prove(passes, model, ids, states, own)
    return states, logits


def _prove(passes: Passes, model: Any, ids: Tensor, expected: Tensor, own: str) -> None:
    """``proof.prove``. Recurrent layers that forget their state before several tokens get one at a time.

    Where transformers' single tokens are others than those of a text, its decoding counts.
    """
    try:
        proof.prove(passes, ids, expected)
    except proof.Different:
        if not passes.chains_only:
            raise
        model.set_attn_implementation(own)
        steps = proof.by_steps(whole_of(model), ids).to(passes.dtype)
        model.set_attn_implementation(NAME)
        if not proof.difference(steps, expected) < proof.TOLERANCE[passes.dtype]:
            proof.prove(passes, ids, steps)
            return
        passes.layers = replace(passes.layers, one_by_one=True)
        passes.layers.mark(passes.base)
        proof.prove(passes, ids, expected)


def _is_unscaled(passes: Passes, lm_head: LMHead, states: Tensor, logits: Tensor) -> bool:
    """Whether a model's logits leave out the scale and the soft cap of its config; refuses what is no linear layer."""
    width, read = states.shape[-1], lm_head.width
    if width == read != passes.hidden_size:
        raise BeagleError(
            f"{passes.name}: its LM head reads {read} numbers a token and its embedding gives {passes.hidden_size}, so "
            "draft heads, which read both, have no width; choose a model where they are equal"
        )
    heads = (lm_head, lm_head.without_scale())
    gaps = [proof.difference(head(states), logits) if width == read else math.inf for head in heads]
    if not min(gaps) < proof.TOLERANCE[passes.dtype]:
        raise BeagleError(
            f"{passes.name}: its logits are more than one linear layer over a hidden state, which draft heads can't "
            "learn to predict; choose a model whose LM head ends with a linear layer"
        )
    return gaps[1] < gaps[0]
