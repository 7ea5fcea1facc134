"""Files that a reader never sees half written, and what a run finds of an earlier one."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from beagle.errors import BeagleError


@contextmanager
def writing_to(where: str | Path, remedy: str = "choose another folder") -> Iterator[None]:
    """Whatever fails in writing becomes one line.

    Raises:
        BeagleError: it names ``where`` and the remedy.
    """
    try:
        yield
    except Exception as error:
        from safetensors import SafetensorError  # takes time that `--help` need not

        if not isinstance(error, OSError | SafetensorError):
            raise
        reason = getattr(error, "strerror", None) or error
        raise BeagleError(f"cannot write '{where}': {reason}; {remedy}") from error


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """Where to write a file that takes the place of ``path`` once it is whole; if that fails, ``path`` stays as it was."""
    partial = path.with_name(f".{path.name}.partial")
    try:
        yield partial
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)


def write_json(path: Path, content: Any) -> None:
    """Write a JSON file so that a reader never sees half of it."""
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")


def write_text(path: Path, text: str) -> None:
    """Replace a file's content so that a reader never sees half of it; a link stays a link, a device a device.

    Raises:
        OSError: it can't be written; what was there is still there.
    """
    if path.exists() and not path.is_file():
        path.write_text(text, encoding="utf-8")  # /dev/stdout, a pipe: must not be replaced by a file
        return
    with replacing(path.resolve()) as partial:
        partial.write_text(text, encoding="utf-8")


def read_json(path: Path, remedy: str) -> dict[str, Any] | None:
    """The object that a JSON file holds; None if there is no such file.

    Raises:
        BeagleError: the file is damaged; ``remedy`` says what to do.
    """
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except FileNotFoundError:
        return None
    except (OSError, ValueError, TypeError) as error:
        raise BeagleError(f"'{path}' is damaged ({error}); {remedy}") from error


def kept_entries(path: Path) -> list[dict[str, Any]]:
    """The objects in the list that a file of the user's cache holds; none where it can't be read: they are made anew."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return []
    return [entry for entry in content if isinstance(entry, dict)] if isinstance(content, list) else []


def first_change(stored: Mapping[str, Any], wanted: Mapping[str, Any]) -> str | None:
    """The first name in ``wanted`` whose value, as JSON has it, isn't the stored one; None if all are the same."""
    now = json.loads(json.dumps(wanted))
    return next((name for name, value in now.items() if stored.get(name) != value), None)
