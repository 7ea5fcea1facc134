"""What ``log.csv`` gets, to TensorBoard, Weights & Biases or trackio, through accelerate's trackers."""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError, first_line

TRACKERS = {"tensorboard": "TensorBoardTracker", "wandb": "WandBTracker", "trackio": "TrackioTracker"}
PROJECT = "beagle"


def refuse_tracker(name: str) -> None:
    """Refuse a tracker that is unknown, or whose package isn't installed."""
    if name not in TRACKERS:
        raise BeagleError(f"tracker '{name}' is unknown; use {', '.join(TRACKERS)}")
    try:
        importlib.import_module(name)
    except ImportError as error:
        raise BeagleError(f"logging with {name} needs a package; install it: pip install {name}") from error


@contextmanager
def tracking(
    name: str | None, out: Path, settings: Mapping[str, Any], step: int
) -> Iterator[Callable[[int, dict[str, float]], None] | None]:
    """A function that logs the values of a step, as long as the context lasts; None without a name.

    Args:
        out: folder of the run; its name is the run's. TensorBoard's files go into ``out/tensorboard``.
        settings: sections of settings, to be shown with the run.
        step: that the run is resumed at; 0: it isn't.
    Raises:
        BeagleError: the tracker can't be started.
    """
    if name is None:
        yield None
        return
    refuse_tracker(name)
    import accelerate.tracking
    from accelerate import PartialState

    PartialState()  # which the trackers ask whether this is the main process
    kind = getattr(accelerate.tracking, TRACKERS[name])
    flat = {
        f"{section}.{key}": value if isinstance(value, bool | int | float | str) else str(value)
        for section, values in settings.items()
        for key, value in values.items()
    }
    try:
        if name == "tensorboard":
            purge = {"purge_step": step + 1} if step else {}  # what the last checkpoint lacks is logged again
            tracker = kind(name, logging_dir=str(out), **purge)
        else:
            tracker = kind(PROJECT, name=out.resolve().name, **({"dir": str(out)} if name == "wandb" else {}))
        tracker.start()
        tracker.store_init_configuration(flat)
    except Exception as error:  # of whatever library
        raise BeagleError(
            f"{name} can't be started ({first_line(error)}); log in to it or set it up, or log without it"
        ) from error
    try:
        yield lambda step, values: tracker.log(values, step=step)
    finally:
        tracker.finish()
