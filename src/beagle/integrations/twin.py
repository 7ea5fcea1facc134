"""A model's twin: modules and a config of its own around the very same weights.

Weights are read where they lie, so that writing to them needs no notice. All else that a model is made of is copied:
modules and their settings, the config, the state of adapters. ``Parts`` tells when a twin has become stale.
"""

from __future__ import annotations

import copy
from types import BuiltinFunctionType, FunctionType, ModuleType
from typing import Any

import torch
from torch import Tensor, nn

from beagle.errors import BeagleError
from beagle.integrations.hooks import replaced_functions
from beagle.targets.family import sample_ids
from beagle.targets.proof import given_positions
from beagle.targets.target import Target

_VALUES = {bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size}
_ATOMS = (type, FunctionType, BuiltinFunctionType, ModuleType)
_OF_EVERY_MODULE = frozenset(vars(nn.Module())) - {"_parameters", "_buffers", "_modules", "training"}
_READ_AT_EACH_CALL = {"generate", "generation_config"}  # of the model itself


class Parts:
    """What a model is made of: all that can be reached from its modules.

    Two of them are equal if nothing was replaced, added, removed or set in between. What was written to a tensor
    makes no difference. They keep what they have seen, so that nothing new can come to lie at its address.
    """

    def __init__(self, model: nn.Module) -> None:
        self._signature: list[object] = []
        self._seen: dict[int, object] = {}
        self._walk(model)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Parts) and self._signature == other._signature

    __hash__ = None  # type: ignore[assignment]

    @property
    def tensors(self) -> list[Tensor]:
        """Parameters, buffers and tensors that are neither."""
        return [part for part in self._seen.values() if isinstance(part, Tensor)]

    def _walk(self, model: nn.Module) -> None:
        note, seen = self._signature.append, self._seen
        waiting: list[Any] = [model]
        while waiting:
            part = waiting.pop()
            if type(part) in _VALUES:
                note(part)
                continue
            note(id(part))
            if id(part) in seen:
                continue
            seen[id(part)] = part
            if type(part) in (Tensor, nn.Parameter):
                note((part.data_ptr(), part.dtype, part.shape, part.stride()))
            elif isinstance(part, nn.Module):
                skipped = _OF_EVERY_MODULE | _READ_AT_EACH_CALL if part is model else _OF_EVERY_MODULE
                for name, value in vars(part).items():
                    if name not in skipped:
                        note(name)
                        waiting.append(value)
            elif isinstance(part, dict):
                note(len(part))
                waiting += part.keys()
                waiting += part.values()
            elif isinstance(part, (list, tuple, set, frozenset)):
                note(len(part))
                waiting += part
            elif not isinstance(part, (Tensor, *_ATOMS)):
                for name, value in getattr(part, "__dict__", {}).items():
                    note(name)
                    waiting.append(value)


def twin(model: Any, parts: Parts) -> Any:
    """A copy of the model around the same tensors, with its parameters frozen.

    Raises:
        BeagleError: there is something in the model that can't be copied.
    """
    shared: dict[int, Any] = {}
    for tensor in parts.tensors:
        plain = type(tensor) is nn.Parameter  # quantised ones are of another class and have no gradient
        shared[id(tensor)] = nn.Parameter(tensor.detach(), requires_grad=False) if plain else tensor
    try:
        ours = copy.deepcopy(model, shared)
    except Exception as error:  # whatever Python can't copy
        reason = str(error).split("\n")[0]
        raise BeagleError(
            f"a {type(model).__name__} can't be drafted for: a part of it can't be copied ({reason}); "
            "take out what isn't part of the model (or speculate(…).remove() first)"
        ) from error
    for module in ours.modules():
        for name in replaced_functions(module):  # by the same code, or the model was refused
            del vars(module)[name]
        module._compiled_call_impl = None  # would run the caller's module
    return ours


@torch.no_grad()
def own_logits(model: Any) -> Tensor:
    """What a model itself says to a few tokens where ``generate`` asks it, ``[tokens, vocabulary]``."""
    ids = _tokens(model, model.get_input_embeddings())
    logits: Tensor = model(input_ids=ids[None], use_cache=False, **given_positions(model, ids)).logits[0]
    return logits


@torch.no_grad()
def refuse_otherwise(target: Target, expected: Tensor) -> None:
    """
    Args:
        target: around a twin, whose passes were found to give the same whatever they are over.
        expected: ``own_logits`` of the model, ``[tokens, vocabulary]``.
    Raises:
        BeagleError: the twin says something else.
    """
    ids = _tokens(target.model, target.embed)
    logits = target.logits(target.prefill(ids[None], target.new_cache(1, len(ids)))[0])
    gap = (logits - expected).abs().max() / expected.abs().max()
    if not gap < (0.01 if target.dtype == torch.float32 else 0.1):  # also catches NaN
        raise BeagleError(
            f"{target.name}: drafted passes, which run in evaluation mode, give other logits than the model itself; "
            "call model.eval() (or speculate(…).remove() first)"
        )


def _tokens(model: Any, embed: nn.Module) -> Tensor:
    weight: Tensor = embed.weight  # type: ignore[assignment]
    return sample_ids(model.config, len(weight), 8).to(weight.device)
