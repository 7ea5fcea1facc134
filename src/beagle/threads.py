"""How long a thread waits for work before it sleeps, and one thread for all that computes."""

from __future__ import annotations

import os
import threading
from collections.abc import Callable
from concurrent.futures import Future
from queue import SimpleQueue
from typing import TypeVar

T = TypeVar("T")

SPINS = 100_000  # a tenth of a millisecond or so: the time between two products of a pass


def wait_briefly() -> None:
    """Let OpenMP's threads spin a little, then sleep; call it before PyTorch is imported, which starts them.

    To sleep at once costs more than a small layer takes, where waking a thread is slow (a virtual machine). To spin
    for long, the default, takes the cores from whoever shares them. What the user set (``OMP_WAIT_POLICY``) stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ["OMP_WAIT_POLICY"] = "PASSIVE"
        os.environ.setdefault("GOMP_SPINCOUNT", str(SPINS))


class ModelThread:
    """One thread, not the main one, for all that computes with a model: loading it, too.

    GNU OpenMP gives each thread that computes a team of its own, and lets no team spin between two products once
    there are more threads than cores: loaded in one thread, a model answers in another one much more slowly.
    """

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None]] = SimpleQueue()
        threading.Thread(target=self._run, name=name, daemon=True).start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """Run something after what was submitted before; the future holds its result or what it raises."""
        done: Future[T] = Future()

        def run() -> None:
            try:
                result = work()
            except BaseException as error:
                done.set_exception(error)
            else:
                done.set_result(result)

        self._work.put(run)
        return done

    def _run(self) -> None:
        while True:
            self._work.get()()


def waits_asleep() -> bool:
    """Whether the environment makes threads sleep at once where they wait, as ``wait_briefly`` would not."""
    return os.environ.get("OMP_WAIT_POLICY", "").upper() == "PASSIVE" and "GOMP_SPINCOUNT" not in os.environ
