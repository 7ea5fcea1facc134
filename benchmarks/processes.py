"""Processes that outlive one call, such as servers: each has a group of its own, and no child of it stays behind."""

from __future__ import annotations

import os
import shlex
import signal
import socket
import subprocess
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from pathlib import Path
from typing import Self

import httpx

SHOWN = 3000  # characters of what a server wrote that did not start


class Started:
    """A command that runs until it is stopped; ``with`` stops it.

    SIGTERM to the process that started it is Ctrl-C from then on, so that ``with`` and ``finally`` stop the command then,
    too: a signal to the starter's group alone does not reach it.
    """

    def __init__(
        self, command: Sequence[str], environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        """
        Args:
            environment: of the command, whole; None for this process's.
            log: where the command writes, errors too; None for where this process does.
        """
        if signal.getsignal(signal.SIGTERM) is signal.SIG_DFL:
            signal.signal(signal.SIGTERM, signal.default_int_handler)
        self.words, self.log = shlex.join(command), log
        with log.open("w") if log else nullcontext() as output:
            self.process = subprocess.Popen(
                command, env=environment, stdout=output, stderr=output, start_new_session=True
            )

    def stop(self, sign: signal.Signals = signal.SIGTERM, seconds: float = 60) -> tuple[int, float]:
        """Signal the command, which ends its children itself; after so many seconds kill it, and always what is left.

        Returns:
            Exit code, and seconds until it came.
        """
        began = time.monotonic()
        try:
            if self.process.poll() is None:
                self.process.send_signal(sign)
            self.process.wait(seconds)
        except subprocess.TimeoutExpired:
            self.process.kill()
        finally:
            with suppress(ProcessLookupError):  # nothing is left
                os.killpg(self.process.pid, signal.SIGKILL)
        return self.process.wait(), round(time.monotonic() - began, 2)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()


class Server(Started):
    """A command that serves HTTP on a port of this machine, with ``/health``."""

    def __init__(
        self, command: Sequence[str], port: int, environment: Mapping[str, str] | None = None, log: Path | None = None
    ) -> None:
        super().__init__(command, environment, log)
        self.url = f"http://127.0.0.1:{port}"

    def wait(self, seconds: float) -> None:
        """Until it is ready.

        Raises:
            SystemExit: it has ended, or isn't ready in time; it is stopped.
        """
        end = time.monotonic() + seconds
        while time.monotonic() < end and self.process.poll() is None:
            with suppress(httpx.HTTPError):
                if httpx.get(self.url + "/health", timeout=5).status_code == 200:
                    return
            time.sleep(0.2)
        code = self.process.poll()
        self.stop()
        wrote = self.log.read_text(errors="replace")[-SHOWN:] if self.log else ""
        ended = f"has ended with code {code}" if code is not None else f"was not ready in {seconds:g} seconds"
        raise SystemExit(f"{wrote.rstrip()}\nthe server {ended}: {self.words}".strip())


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])
