"""LM heads that transform hidden states (a dense layer, an activation, a norm) before the linear layer to the vocabulary.

The transform moves behind the model's layers: what it gives is the model's hidden state from then on, and its LM head is one
linear layer, as in most families. The model computes what it did before.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import nn

from beagle.targets.devices import device_of
from beagle.targets.family import sample_ids, whole_of
from beagle.targets.proof import TOLERANCE, difference

NAME = "beagle_head_transform"  # of the transform among the modules of a model without its LM head


@torch.no_grad()
def move_transform(model: Any) -> nn.Module | None:
    """Let a causal LM's hidden states be those that the linear layer of its LM head reads.

    Args:
        model: a causal LM of transformers; unchanged where its LM head transforms nothing, or can't be taken apart.
    Returns:
        The linear layer, or what takes its place; None: the model has none.
    """
    base = whole_of(model)
    linear: nn.Module | None = model.get_output_embeddings()
    beside = {child: name for name, child in model.named_children() if child is not base}
    if linear is None or base is model or not any(has_weights(child) for child in beside if child is not linear):
        return linear
    ids = sample_ids(model.config, int(model.get_input_embeddings().weight.shape[0]), 4).to(device_of(model))[None]
    steps: list[nn.Module] = []
    with ExitStack() as hooks:
        for child in beside:
            hooks.enter_context(child.register_forward_pre_hook(lambda module, inputs: steps.append(module)))
        try:
            expected = model(input_ids=ids, use_cache=False).logits[0]
        except Exception:  # whatever a model stumbles over; reported where its layers are looked at
            return linear
    if steps == [linear] or not steps or linear not in set(steps[-1].modules()):
        return linear
    slots = [(parent, name) for parent in steps[-1].modules() for name, own in parent.named_children() if own is linear]
    for parent, name in slots:
        setattr(parent, name, nn.Identity())
    last = beside[steps[-1]]
    for step in steps:
        setattr(model, beside[step], nn.Identity())
    setattr(model, last, linear)
    base.add_module(NAME, nn.Sequential(*(step for step in steps if step is not linear)))
    hook = base.register_forward_hook(_transform)
    try:
        found = model(input_ids=ids, use_cache=False).logits[0]
        if difference(found, expected) < TOLERANCE[expected.dtype]:
            return linear
    except Exception:  # a transform that gives more than hidden states (XLM): it stays where it was
        pass
    hook.remove()
    delattr(base, NAME)
    for parent, name in slots:
        setattr(parent, name, linear)
    for step in steps:
        setattr(model, beside[step], step)
    return linear


def has_weights(module: nn.Module) -> bool:
    """Whether a module has parameters."""
    return next(module.parameters(), None) is not None


def _transform(base: nn.Module, inputs: Any, output: Any) -> Any:
    """A model's output with its hidden states transformed."""
    states = base.get_submodule(NAME)(output[0])
    if isinstance(output, tuple):
        return (states, *output[1:])
    output["last_hidden_state"] = states
    return output
