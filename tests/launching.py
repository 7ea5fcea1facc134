"""``beagle`` in several processes, as a launcher starts it, but forked: what is imported need not be again."""

from __future__ import annotations

import atexit
import multiprocessing
import os
import signal
import socket
import sys
import time
from contextlib import suppress
from pathlib import Path

import torch

from beagle.cli import main

PROCESSES = multiprocessing.get_context("fork")


def free_port() -> int:
    """Below those that the system hands out, which another test could be given before it is taken."""
    for port in range(10_000 + os.getpid() % 20_000, 32_000):
        with socket.socket() as own, suppress(OSError):
            own.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")


def command(rank: int, count: int, port: int, words: list[str], stderr: Path) -> None:
    """``beagle`` as one process of several, in a process that has imported it."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port), "BEAGLE_CACHE": str(stderr.parent / "cache"), "COLUMNS": "300", "TERM": "dumb",
    }  # fmt: skip
    sys.stdout = sys.stderr = stderr.open("w", buffering=1)
    torch.set_num_threads(1)  # the parent's other threads are not here
    sys.argv = ["beagle", *words]
    atexit._clear()  # the parent's
    try:
        main.run()
    finally:
        atexit._run_exitfuncs()


class Launch:
    """``beagle`` in several processes."""

    def __init__(self, folder: Path, words: list[list[str]]) -> None:
        folder.mkdir(exist_ok=True)
        port = free_port()
        self.stderr = [folder / f"stderr-{rank}" for rank in range(len(words))]
        self.processes = [
            PROCESSES.Process(target=command, args=(rank, len(words), port, own, self.stderr[rank]))
            for rank, own in enumerate(words)
        ]
        for process in self.processes:
            process.start()

    def wait_for(self, path: Path) -> None:
        while not path.exists():
            assert any(process.is_alive() for process in self.processes), self.errors()
            time.sleep(0.002)

    def kill(self, rank: int) -> None:
        os.kill(self.processes[rank].pid, signal.SIGKILL)

    def codes(self) -> list[int]:
        for process in self.processes:
            process.join(300)
        return [process.exitcode for process in self.processes]

    def errors(self) -> list[str]:
        """What the processes printed but for bars, and all lines of errors."""
        return [path.read_text() for path in self.stderr if path.exists()]

    def refusal(self) -> str:
        """The one line of an error, of whichever process."""
        text = "".join(self.errors())
        assert "Traceback" not in text
        lines = [line for line in text.splitlines() if line.startswith(("error: ", "failure of ours: "))]
        assert len(lines) == 1, text
        return lines[0]
