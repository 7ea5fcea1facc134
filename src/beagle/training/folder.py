"""A run's folder: one run of one kind of settings at a time, and a log that has every step once."""

from __future__ import annotations

import csv
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from beagle.errors import BeagleError
from beagle.files import write_text, writing_to
from beagle.training.config import TrainConfig

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]  # Windows: two runs in one folder are the user's to avoid

LOG = "log.csv"
CHECKPOINT = "checkpoint.safetensors"
FREE = ("micro_batch_tokens",)  # settings of ``TrainConfig`` that a resumed run may change
COLUMNS = ["step", "stage", "loss", "seconds", "tokens", *(f"alpha_{j}" for j in range(1, 6))]


@contextmanager
def alone(folder: Path, lock: str = ".run.lock") -> Iterator[None]:
    """Keep other runs out of a folder, which is made if it isn't there; a run that dies lets go of it.

    Args:
        lock: the file that is locked; it stays.
    Raises:
        BeagleError: another run is at work there (its process is named), or the folder can't be written.
    """
    with writing_to(folder):
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder / lock, os.O_RDWR | os.O_CREAT, 0o666)
    try:
        if fcntl is not None:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError as error:
                owner = os.read(handle, 32).decode(errors="replace").strip() or "unknown"
                raise BeagleError(
                    f"'{folder}' is in use by another run (process {owner}); wait for its end, or choose another folder"
                ) from error
            except OSError:
                pass  # a file system without locks
            os.ftruncate(handle, 0)
            os.write(handle, f"{os.getpid()}\n".encode())
        yield
    finally:
        os.close(handle)  # which unlocks


def append_log(out: Path, row: list[Any]) -> None:
    path = out / LOG
    new = not path.exists()
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if new:
            writer.writerow(COLUMNS)
        writer.writerow(row)


def cut_log(out: Path, step: int) -> None:
    """Drop what the log says of steps after ``step``: they will be made again."""
    path = out / LOG
    if not path.is_file():
        return
    lines = path.read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines[1:] if (first := line.partition(",")[0]).isdigit() and int(first) <= step]
    if not step:
        path.unlink()
    elif len(kept) + 1 < len(lines):
        write_text(path, "\r\n".join([lines[0], *kept]) + "\r\n")


def identity(config: TrainConfig, head: dict[str, Any]) -> dict[str, Any]:
    """The settings that tell a run from another."""
    return dict(json.loads(json.dumps({"train": asdict(config), "head": head})))


def read_progress(out: Path, expected: dict[str, Any]) -> dict[str, Any] | None:
    """How far the run in a folder has come; None where none has left a checkpoint.

    Args:
        expected: the settings that it must have, see ``identity``.
    Raises:
        BeagleError: it has others, or the checkpoint is damaged.
    """
    path = out / CHECKPOINT
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            progress = dict(json.loads(file.metadata()["progress"]))
    except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
        raise BeagleError(f"checkpoint '{path}' is corrupt ({error}); delete it to start over") from error
    saved = progress["identity"]
    saved["train"] = {**identity(TrainConfig(), {})["train"], **saved["train"]}  # what is younger stood at its default
    saved["train"] |= {name: expected["train"][name] for name in FREE}
    if saved != expected:
        raise BeagleError(f"'{out}' holds a run with other settings; choose another folder or delete it")
    return progress
