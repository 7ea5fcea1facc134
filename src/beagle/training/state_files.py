"""Files of hidden states that vLLM's connector writes, one for each request, with a lock while it writes."""

from __future__ import annotations

import time
from contextlib import suppress
from pathlib import Path
from typing import Any

try:
    import fcntl
except ImportError:  # pragma: no cover
    fcntl = None  # type: ignore[assignment]  # Windows, where vLLM isn't


def written_file(reply: dict[str, Any], folder: Path) -> Path | None:
    """The file of hidden states that a reply of vLLM's names, as it is called here; None: it names none."""
    found = reply.get("kv_transfer_params")
    path = found.get("hidden_states_path") if isinstance(found, dict) else None
    return folder / Path(path).name if isinstance(path, str) else None


def wait_for_file(file: Path, patience: float) -> None:
    """Wait until the server has let go of a file's lock, which it holds while it writes.

    Raises:
        FileNotFoundError: there is no lock, and no file.
        TimeoutError: it is still held after ``patience`` seconds.
    """
    lock = Path(f"{file}.lock")
    if not lock.exists():
        file.stat()
        return
    end = time.monotonic() + patience
    with lock.open() as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                if time.monotonic() > end:
                    raise TimeoutError from None
                time.sleep(0.005)
            else:
                return


def discard(file: Path) -> None:
    """Delete a file of states, and its lock."""
    for path in (file, Path(f"{file}.lock")):
        with suppress(OSError):
            path.unlink()


def drop_file(reply: dict[str, Any], folder: Path, patience: float) -> None:
    """Delete the file that a reply names, if any, once it is written: nobody wants it."""
    if (file := written_file(reply, folder)) is not None:
        with suppress(OSError):
            wait_for_file(file, patience)
        discard(file)
