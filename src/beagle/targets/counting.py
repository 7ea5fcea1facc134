"""Position embeddings that a model looks up by the length of its cache, whatever positions it is given."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor, nn

from beagle.targets.attention import current_plan


class GivenPositions:
    """In the place of such a module's ``forward``: in a pass it looks up the plan's positions."""

    def __init__(self, own: Callable[..., Tensor]) -> None:
        """
        Args:
            own: the module's ``forward``, which may be told the positions as ``position_ids [tokens]``.
        """
        self._own = own

    def __call__(self, *arguments: Any, **options: Any) -> Tensor:
        plan = current_plan.get(None)
        if plan is not None:
            options["position_ids"] = plan.positions[0]
        return self._own(*arguments, **options)


def give_positions(base: nn.Module) -> bool:
    """Let the position embeddings of a model, without its LM head, follow the plan of a pass.

    Returns:
        Whether there are such embeddings.
    """
    tables: list[nn.Module] = [module for module in base.modules() if isinstance(module, nn.Embedding)]
    found = [module for module in tables if "position_ids" in inspect.signature(module.forward).parameters]
    for module in found:
        module.forward = GivenPositions(module.forward)
    return bool(found)
