"""Which drafter a name stands for: ``auto``, a head shipped or trained, lookup, a small model, or two in one tree."""

from __future__ import annotations

from typing import Any

from beagle.drafters import captured, compiled
from beagle.drafters.base import Drafter
from beagle.drafters.checkpoint import find_head, load_head, shipped_head
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.head_drafter import HeadDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import PREFIX, load_small
from beagle.targets.loading import compiled_dir
from beagle.targets.target import Target


def resolve_draft(draft: str | None, target_name: str) -> str:
    """A ``draft`` (see ``beagle.load``) with ``auto`` and None replaced by what they stand for.

    Raises:
        BeagleError: it names a head that isn't there: found out before a target is loaded.
    """
    if draft == "auto":
        draft = "head+lookup" if shipped_head(target_name) else "none"
    draft = "none" if draft is None else draft
    if names_head(draft):
        find_head(draft.removesuffix("+lookup"), target_name)
    return draft


def names_head(draft: str) -> bool:
    """Whether a ``draft`` other than ``auto`` has a head in it."""
    base = draft.removesuffix("+lookup")
    return base not in ("none", "lookup") and not base.startswith(PREFIX)


def load_drafter(draft: str, target: Target, **options: Any) -> Drafter | None:
    """The drafter that ``draft`` names (see ``beagle.load``; ``none`` is plain decoding) on a loaded target.

    Args:
        options: how a small model is loaded, as of ``targets.loading.load_target``.
    Raises:
        BeagleError: it can't be loaded or doesn't fit the target.
    """
    draft = resolve_draft(draft, target.name)
    base = draft.removesuffix("+lookup")
    drafter: Drafter | None = None
    if names_head(draft):
        head = load_head(find_head(base, target.name), target)
        fast = compiled.find(compiled_dir(), target, head)  # before its weights are packed
        drafter = headed = HeadDrafter(target, head)
        if fast is not None:
            headed.use_compiled(fast)
        captured.capture(headed)
    elif base == "lookup":
        drafter = LookupDrafter()
    elif base.startswith(PREFIX):
        drafter = load_small(base.removeprefix(PREFIX), target, **options)
    if drafter is not None and base != draft:
        drafter = CombinedDrafter(drafter, LookupDrafter())
    return drafter
