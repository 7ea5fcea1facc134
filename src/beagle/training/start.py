"""Where a training starts: at another head's weights instead of random ones (``beagle train --init``)."""

from __future__ import annotations

import hashlib
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from beagle.drafters.block import Block
from beagle.drafters.checkpoint import find_head, head_settings, weight_files
from beagle.drafters.load import DraftSpec
from beagle.errors import BeagleError
from beagle.files import read_json, write_json
from beagle.training.folder import CHECKPOINT
from beagle.training.recipe import Recipe, checked_head

START = "start.json"


def find_start(init: str, target_name: str) -> Path:
    """The folder of the head that ``init`` names, as a draft does (see ``DraftSpec``).

    Raises:
        BeagleError: it names no head, or one that isn't there.
    """
    head = DraftSpec.parse(init, target_name).head
    if head is None:
        raise BeagleError(
            f"init '{init}' names no head to start from; give head (the shipped one), a folder that `beagle train` "
            "wrote, or ORG/NAME of one on the hub"
        )
    return find_head(head, target_name)


def with_shape_of(recipe: Recipe, folder: Path) -> Recipe:
    """The recipe with the architecture and settings of the head in ``folder``, which it may name, too.

    Raises:
        BeagleError: it is no draft head, or the recipe names another setting (named).
    """
    found = checked_head(head_settings(folder), folder / "config.json")
    for name, value in recipe.head.items():
        if name == "kv_layers" and value == "auto" and found.get(name):
            continue  # the head has chosen
        if name not in found or found[name] != value:
            raise BeagleError(
                f"init '{folder}': {name} of its head is {found.get(name)!r}, and the recipe's head section has "
                f"{value!r}; a head starts from one of the same shape: leave {name} out of the recipe, or give another head"
            )
    return replace(recipe, head=found)


def digest(folder: Path | None) -> str | None:
    """16 hexadecimal digits of a head's weights; None of no head."""
    if folder is None:
        return None
    found = hashlib.sha256()
    for path in weight_files(folder):
        found.update(path.read_bytes())
    return found.hexdigest()[:16]


def refuse_other_start(out: Path, folder: Path | None) -> None:
    """
    Args:
        folder: of the head that it is to start from; None: it starts from random weights.
    Raises:
        BeagleError: the run that ``out`` holds started from another one.
    """
    if not (out / CHECKPOINT).is_file():
        return
    before = started_from(out)
    if before.get("digest") != digest(folder):
        raise BeagleError(
            f"'{out}' holds a run that started from {before.get('head') or 'random weights'}; start from "
            "the same, or choose another folder"
        )


@torch.no_grad()
def start_from(head: Block, other: Block, folder: Path, out: Path, tau: float | None) -> None:
    """Give a fresh head another one's weights, and note it in the folder of the run.

    The draft vocabulary stays the fresh head's: no weight depends on it, since the LM head is the target's.

    Args:
        head: of the same shape; changed in place.
        other: the head to start from, which ``folder`` holds.
        tau: of the other head on held-out prompts, to be noted; None: not measured.
    """
    weights = {name: tensor for name, tensor in other.state_dict().items() if name != "draft_vocab"}
    head.load_state_dict({**weights, "draft_vocab": head.draft_vocab})
    write_json(out / START, {"head": folder.name, "digest": digest(folder), "tau": tau and round(tau, 3)})


def started_from(out: Path) -> dict[str, Any]:
    """What ``start_from`` has noted in the folder of a run."""
    return read_json(out / START, f"delete '{out}' to start over") or {}
