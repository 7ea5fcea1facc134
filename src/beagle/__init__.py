"""Lossless speculative decoding with cross-attention draft heads."""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from beagle.decoding.sampling_params import SamplingParams
    from beagle.drafters.base import TreePlan
    from beagle.errors import BeagleError
    from beagle.integrations.transformers import Speculation, speculate
    from beagle.model import Answer, Model, Piece, load
    from beagle.targets.loading import load_model

__version__ = "0.1.0"
__all__ = [
    "Answer",
    "BeagleError",
    "Model",
    "Piece",
    "SamplingParams",
    "Speculation",
    "TreePlan",
    "__version__",
    "load",
    "load_model",
    "speculate",
]

_HOMES = {
    "SamplingParams": "decoding.sampling_params",
    "TreePlan": "drafters.base",
    "BeagleError": "errors",
    "Speculation": "integrations.transformers",
    "speculate": "integrations.transformers",
    "Answer": "model",
    "Model": "model",
    "Piece": "model",
    "load": "model",
    "load_model": "targets.loading",
}


def __getattr__(name: str) -> Any:
    """Names of the front, whose modules need seconds to import PyTorch: the command wants to be asked first."""
    if name not in _HOMES:
        raise AttributeError(f"module 'beagle' has no attribute '{name}'")
    return getattr(import_module(f"beagle.{_HOMES[name]}"), name)
