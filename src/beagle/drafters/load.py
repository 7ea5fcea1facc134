"""From the name of a draft to its drafter: a head shipped or trained, lookup, a small model, or two in one tree."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from beagle.drafters import captured, compiled, native
from beagle.drafters.base import Drafter
from beagle.drafters.checkpoint import find_head, kv_layers, load_head, shipped_head
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.head_drafter import HeadDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import PREFIX, load_small
from beagle.errors import BeagleError
from beagle.targets.loading import compiled_dir
from beagle.targets.target import Target


@dataclass(frozen=True)
class DraftSpec:
    """What to draft with; nothing at all is plain decoding.

    Attributes:
        head: ``head`` (the one shipped for the target), a folder that ``beagle train`` wrote, or ``ORG/NAME[@revision]`` of a
            head on the hub.
        model: name of a small model.
        lookup: prompt lookup, alone or in one tree with the head or the model.
    """

    head: str | None = None
    model: str | None = None
    lookup: bool = False

    @classmethod
    def parse(cls, draft: str | bool | None, target_name: str) -> DraftSpec:
        """Take a ``draft`` apart (see ``beagle.load``); whether there is such a head or model is not looked at.

        Args:
            draft: ``auto`` is ``head+lookup`` where a head is shipped, else ``none``; None and False are ``none``.

        Raises:
            BeagleError: it is no text.
        """
        if draft == "auto":
            draft = "head+lookup" if shipped_head(target_name) else "none"
        if draft in (None, False, "none"):
            return cls()
        if not isinstance(draft, str):
            raise BeagleError(f"draft {draft!r} is no text; give auto, head, lookup, none or a head's folder")
        if draft == "lookup":
            return cls(lookup=True)
        base = draft.removesuffix("+lookup")
        if base.startswith(PREFIX):
            return cls(model=base.removeprefix(PREFIX), lookup=base != draft)
        return cls(head=base, lookup=base != draft)

    def __str__(self) -> str:
        name = f"{PREFIX}{self.model}" if self.model is not None else self.head
        parts = [*([] if name is None else [name]), *(["lookup"] if self.lookup else [])]
        return "+".join(parts) or "none"


def state_layers(spec: DraftSpec, target_name: str) -> tuple[int, ...]:
    """The layers that a draft's head reads beside the top state: load the target with them.

    Raises:
        BeagleError: there is no such head.
    """
    return kv_layers(find_head(spec.head, target_name)) if spec.head is not None else ()


def resolve_draft(draft: str | bool | None, target_name: str) -> DraftSpec:
    """``DraftSpec.parse``, refusing what can be refused before a target is loaded.

    Raises:
        BeagleError: it names a head that isn't there.
    """
    spec = DraftSpec.parse(draft, target_name)
    if spec.head is not None:
        find_head(spec.head, target_name)
    return spec


def load_drafter(spec: DraftSpec, target: Target, **options: Any) -> Drafter | None:
    """The drafter of a loaded target; None is plain decoding.

    Args:
        **options: how a small model is loaded, as of ``targets.loading.load_target``.

    Raises:
        BeagleError: it can't be loaded or doesn't fit the target.
    """
    drafter: Drafter | None = None
    if spec.head is not None:
        head = load_head(find_head(spec.head, target.name), target)
        # before its weights are packed
        whole = native.find(compiled_dir(), target, head)
        graphs = compiled.find(compiled_dir(), target, head) if whole is None else None
        drafter = headed = HeadDrafter(target, head)
        if whole is not None:
            headed.use(whole, "native")
        elif graphs is not None:
            headed.use(graphs, "compiled")
        captured.capture_drafts(headed)
    elif spec.model is not None:
        drafter = load_small(spec.model, target, **options)
    if not spec.lookup:
        return drafter
    return LookupDrafter() if drafter is None else CombinedDrafter(drafter, LookupDrafter())
