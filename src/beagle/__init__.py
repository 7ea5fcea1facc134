"""Lossless speculative decoding with cross-attention draft heads."""

from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.integrations.transformers import Speculation, speculate
from beagle.model import Answer, Model, Piece, load

__version__ = "0.1.0"
__all__ = ["Answer", "BeagleError", "Model", "Piece", "Speculation", "TreePlan", "__version__", "load", "speculate"]
