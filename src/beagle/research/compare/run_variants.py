"""All variants of a comparison, one after the other, each in a fresh process; what is finished is kept."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, replace
from itertools import count
from multiprocessing import active_children, get_context
from pathlib import Path
from typing import Any, TypeVar

from beagle.errors import BeagleError
from beagle.files import first_change, read_json
from beagle.research.compare.train_variant import Spec, train_variant
from beagle.research.compare.variants import Variant
from beagle.training.config import TrainConfig
from beagle.training.data import batches
from beagle.training.recipe import Recipe, head_layers
from beagle.training.states import StateStore

T = TypeVar("T")


@dataclass(frozen=True)
class Budget:
    """What every variant may spend: tokens of training, or seconds of it (validation not counted)."""

    tokens: int | None = None
    seconds: float | None = None


def in_fresh_process(work: Callable[..., T], *arguments: Any) -> T:
    """Run ``work`` where nothing else has left its memory; its errors come back as they are.

    Raises:
        BeagleError: the process was killed.
    """
    before = signal.signal(signal.SIGTERM, _end_children)
    try:
        # where a shell starts a job in the background its processes ignore SIGINT, unless a handler is set
        handler = (signal.SIGINT, signal.default_int_handler)
        with ProcessPoolExecutor(1, get_context("spawn"), signal.signal, handler) as pool:
            return pool.submit(work, *arguments).result()
    except BrokenProcessPool as error:
        raise BeagleError(
            "the process of this variant was killed, as happens where memory runs out; "
            "free some or lower batch_tokens, then run the same command again"
        ) from error
    finally:
        signal.signal(signal.SIGTERM, before)


def _end_children(*_: object) -> None:
    """A job's manager ends this process as Ctrl-C does; unlike Ctrl-C, its signal doesn't reach the one that trains."""
    for child in active_children():
        if child.pid is not None:
            os.kill(child.pid, signal.SIGINT)
    raise KeyboardInterrupt


def specs(
    variants: list[Variant],
    seeds: list[int],
    store: StateStore,
    recipe: Recipe,
    budget: Budget,
    target: dict[str, Any],
    out: Path,
    validate_every: int | None = None,
) -> list[Spec]:
    """A run for each variant and seed, seeds outermost, so that a comparison is whole after the first."""
    planned = []
    data_tokens = store.tokens()
    counted: dict[tuple[int, int], tuple[int, int]] = {}  # by seed and batch size
    for seed in seeds:
        for variant in variants:
            train, head = variant.settings(recipe, seed)
            refuse_missing_layers(variant.name, head_layers(head, store.fingerprint.layers), store)
            train = replace(train, validate_every=validate_every or train.validate_every)
            if budget.tokens is not None:
                if (seed, train.batch_tokens) not in counted:
                    counted[seed, train.batch_tokens] = steps_for(store, train.batch_tokens, seed, budget.tokens)
                train = in_steps(train, *counted[seed, train.batch_tokens])
            folder = out / "runs" / variant.plain_name(recipe) / f"seed{seed}"
            planned.append(
                Spec(variant.name, seed, target, store.folder, data_tokens, folder, train, head, budget.seconds)
            )
    return planned


def refuse_missing_layers(variant: str, layers: Sequence[int], store: StateStore) -> None:
    """
    Raises:
        BeagleError: the variant's head reads ``layers`` of the target, and not all of them are stored.
    """
    stored = store.fingerprint.state_layers
    if missing := sorted({*layers} - {*stored}):
        raise BeagleError(
            f"variant '{variant}' reads layers {', '.join(map(str, layers))} of the target, but '{store.folder}' holds no "
            f"states of {', '.join(map(str, missing))}; run `beagle train` into another folder with "
            f"answers.state_layers: {sorted({*layers, *stored})} in its recipe"
        )


def steps_for(store: StateStore, batch_tokens: int, seed: int, tokens: int) -> tuple[int, int]:
    """Steps until at least ``tokens`` tokens are trained on, and steps of an epoch.

    Batches depend on the data, the seed and ``batch_tokens`` alone: the same for every variant.

    Raises:
        BeagleError: no answer is long enough to train on.
    """
    steps = seen = per_epoch = 0
    for epoch in count():
        for group in batches(store, tokens=batch_tokens, seed=seed, epoch=epoch):
            if seen < tokens:
                steps, seen = steps + 1, seen + sum(len(s.tokens) for s in group)
            per_epoch += epoch == 0
        if not per_epoch:
            raise BeagleError(f"'{store.folder}' holds no answer long enough to train on; give more prompts")
        if seen >= tokens:
            return steps, per_epoch
    raise AssertionError


def in_steps(train: TrainConfig, steps: int, per_epoch: int) -> TrainConfig:
    """Shares of a budget as epochs, so that the trainer's own rounding gives exactly ``steps``."""
    early = round(steps * train.early_epochs)
    return replace(train, early_epochs=early / per_epoch, late_epochs=(steps - early) / per_epoch)


def run_all(planned: list[Spec], report: Callable[[str], None]) -> list[dict[str, Any]]:
    """Train what is not finished; the records of all, in order.

    Raises:
        BeagleError: a folder holds a run with other settings.
    """
    records = []
    for i, spec in enumerate(planned, 1):
        done = finished(spec)
        report(f"{i}/{len(planned)} {spec.variant}, seed {spec.seed}{': kept' if done else ''}")
        records.append({**(done or in_fresh_process(train_variant, spec)), "variant": spec.variant})
    return records


def finished(spec: Spec) -> dict[str, Any] | None:
    """The record of a run that is through, if it is this very one."""
    path = spec.out / "result.json"
    remedy = "delete its folder and run the same command again"
    record = read_json(path, remedy)
    if record is None:
        return None
    try:
        settings = record["settings"]
        settings["train"] = {**asdict(TrainConfig()), **settings["train"]}  # options younger than the run: at default
    except (KeyError, TypeError) as error:
        raise BeagleError(f"'{path}' is damaged ({error}); {remedy}") from error
    if first_change(settings, spec.settings()):
        raise BeagleError(
            f"'{spec.out}' holds a run with another budget, recipe, target or data; choose another folder or delete it"
        )
    return record
