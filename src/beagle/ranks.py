"""Several processes that work on one run, as torchrun or ``accelerate launch`` start them.

Each is a *rank*. Rank 0 leads: it alone writes files and prints. All that ranks send each other is numbers and bytes.
"""

from __future__ import annotations

import atexit
import copy
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from beagle.errors import BeagleError

MEETING = timedelta(minutes=10)  # for all ranks to start
STEP = timedelta(minutes=30)  # for a sum: rank 0 may write a checkpoint before it
BEAT = 5.0  # seconds between two signs of life of rank 0
SILENCE = 300.0  # seconds without one, after which those that wait for rank 0 give up
REPORT = 10.0  # seconds that a stopped rank gives rank 0 to report it
LINGER = 3.0  # seconds that rank 0, which may hold what the others ask, outlives its failure

AGAIN = "run the same command again, with any number of ranks: it goes on from the last checkpoint"


class RankLost(BeagleError):
    """Another rank has ended, or can't be reached."""


class Ranks:
    """This process among those of its run. One that is alone sends nothing.

    Attributes:
        rank: its number, from 0.
        count: processes of the run.
    """

    def __init__(self, rank: int = 0, count: int = 1, store: dist.Store | None = None) -> None:
        self.rank, self.count = rank, count
        self._store: Any = store
        self._reports: bool | None = None
        self._mirrored = False

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def device(self, device: str) -> str:
        """This rank's own GPU, where ``device`` names none and there are some."""
        if self.count > 1 and device in ("auto", "cuda") and torch.cuda.is_available():
            return f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
        return device

    @property
    def divide(self) -> bool:
        """Whether each computes a part of a batch, so that all must sum: even those whose part is all of it, or nothing."""
        return self.count > 1 and not self._mirrored

    def share(self, samples: int) -> slice:
        """This rank's part of so many samples, which lie together; it may be empty."""
        if self._mirrored:
            return slice(0, samples)
        return slice(self.rank * samples // self.count, (self.rank + 1) * samples // self.count)

    def every(self) -> slice:
        """This rank's part of a list whose items are taken in turn."""
        return slice(None) if self._mirrored else slice(self.rank, None, self.count)

    def mirrored(self) -> Ranks:
        """The same ranks where each computes the whole, as they do whose target is divided among them."""
        same = copy.copy(self)
        same._mirrored = True
        return same

    def sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors by their sums over all ranks, the same bits on each.

        Args:
            tensors: of one dtype and device, of the same shapes on all ranks.
        Raises:
            RankLost: another rank has ended.
        """
        if not self.divide:
            return
        flat = torch.cat([tensor.reshape(-1) for tensor in tensors])
        with self._together():
            dist.all_reduce(flat)
        for tensor, part in zip(tensors, flat.split([tensor.numel() for tensor in tensors]), strict=True):
            tensor.copy_(part.view_as(tensor))

    def broadcast(self, content: bytes, source: int = 0) -> bytes:
        """
        Args:
            content: what this rank has; only that of ``source`` counts.
        Returns:
            What ``source`` has.
        Raises:
            RankLost: another rank has ended.
        """
        if self.count == 1:
            return content
        size = torch.tensor([len(content)])
        with self._together():
            dist.broadcast(size, source)
            data = torch.empty(int(size), dtype=torch.uint8)
            if self.rank == source:
                data = torch.frombuffer(bytearray(content or b"-"), dtype=torch.uint8)[: len(content)]
            if int(size):
                dist.broadcast(data, source)
        return data.numpy().tobytes()

    def agree_on(self, value: Any) -> Any:
        """Rank 0's value, on all ranks; as JSON has it."""
        return value if self.count == 1 else json.loads(self.broadcast(json.dumps(value).encode()))

    def refuse_difference(self, about: dict[str, Any], remedy: str) -> None:
        """
        Args:
            about: what must be the same on all ranks, by name; as JSON has it.
        Raises:
            BeagleError: something isn't; it is named, on all ranks.
            RankLost: another rank has ended.
        """
        if self.count == 1:
            return
        first, *others = (json.loads(self.broadcast(json.dumps(about).encode(), rank)) for rank in range(self.count))
        for rank, theirs in enumerate(others, 1):
            if other := next((name for name, value in first.items() if theirs.get(name) != value), None):
                raise BeagleError(
                    f"rank {rank} has another {other} than rank 0 ({theirs.get(other)}, not {first[other]}); {remedy}"
                )

    def tell(self, what: str) -> None:
        """Let those go on that wait for rank 0 to have done something (see ``wait_for``)."""
        if self.count > 1:
            with self._together():
                self._store.set(what, b"done")

    def wait_for(self, what: str) -> None:
        """Wait until rank 0 has done something, for as long as it gives signs of life.

        Raises:
            RankLost: it gives none, or a rank has failed.
        """
        beat, heard = b"", time.monotonic()
        while True:
            with self._together():
                if self._store.check([what]):
                    return
                latest = self._store.get("beat") if self._store.check(["beat"]) else b""
                failed = self._store.check(["failed"])
            if failed:
                raise RankLost(f"a rank failed while rank {self.rank} waited for the {what}; {AGAIN}")
            now = time.monotonic()
            if latest != beat:
                beat, heard = latest, now
            elif now - heard > SILENCE:
                raise RankLost(
                    f"rank {self.rank} waits for the {what} that rank 0 makes, which has given no sign of life for "
                    f"{SILENCE:.0f} s; see what holds it up, then {AGAIN}"
                )
            time.sleep(0.1)

    def reports(self) -> bool:
        """Whether this rank, the first that asks, is the one that prints why the run ends."""
        if self._reports is None:
            try:
                self._reports = self._store is None or self._store.add("reports", 1) == 1
                if self._store is not None:
                    self._store.set("failed", b"")
                    self._store.add("heard", 0 if self.leads else 1)
            except RuntimeError:  # the store was in rank 0, which has ended
                self._reports = self.rank == 1
        return self._reports

    def stopped(self) -> bool:
        """Whether this rank, interrupted, is the one that prints so: another than rank 0 only if that can't."""
        end = time.monotonic() + REPORT
        while not self.leads and time.monotonic() < end:
            try:
                if self._store.check(["failed"]):
                    return False
            except RuntimeError:
                break
            time.sleep(0.1)
        return self.reports()

    def leave(self) -> None:
        """End together: rank 0, which may hold what the others wait for, is the last."""
        end = time.monotonic() + STEP.total_seconds()
        with suppress(RuntimeError):
            self._store.add("left", 1)
            while self.leads and self._store.add("left", 0) < self.count and time.monotonic() < end:
                if self._store.check(["failed"]):
                    return
                time.sleep(0.05)

    def linger(self) -> None:
        """Let the others, whose run this rank has ended, ask whether they report it."""
        if not self.leads:
            return
        end = time.monotonic() + LINGER
        with suppress(RuntimeError):
            if dist.get_backend() == "gloo":
                dist.destroy_process_group()  # they wait in it
            while self._store.add("heard", 0) < self.count - 1 and time.monotonic() < end:
                time.sleep(0.05)

    def give_signs_of_life(self) -> None:
        """From now on, in a thread that ends with the process."""

        def run() -> None:
            number = 0
            while True:
                number += 1
                try:
                    self._store.set("beat", str(number))
                except RuntimeError:
                    return
                time.sleep(BEAT)

        threading.Thread(target=run, name="signs of life", daemon=True).start()

    @contextmanager
    def _together(self) -> Iterator[None]:
        """Raise ``RankLost`` where what needs the other ranks fails."""
        try:
            yield
        except RuntimeError as error:  # that of torch.distributed, whichever library is under it
            raise _lost(error) from error


ALONE = Ranks()


@contextmanager
def _lost_in_a_pass() -> Iterator[None]:
    """Raise ``RankLost`` where a library under torch.distributed loses a rank in the midst of a model's pass."""
    try:
        yield
    except RuntimeError as error:
        if not re.search(r"gloo|nccl|connection (reset|closed)", str(error), re.IGNORECASE):
            raise
        raise _lost(error) from error


def _lost(error: Exception) -> RankLost:
    return RankLost(f"another rank has ended or can't be reached ({reason_of(error)}); {AGAIN}")


def reason_of(error: BaseException) -> str:
    """The first sentence of an error, without the line of the library's source that it comes from."""
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return re.sub(r"^\[\S+:\d+\] ", "", lines[0]).split(". ")[0]


def launched() -> bool:
    """Whether a launcher has started this process as one of several."""
    return os.environ.get("WORLD_SIZE", "1") != "1" and "RANK" in os.environ


@contextmanager
def joined() -> Iterator[Ranks]:
    """The ranks of this run; a failure is reported by one of them, and the others end without a word.

    Raises:
        BeagleError: the ranks don't find each other.
        SystemExit: another rank reports why the run ends.
    """
    if not launched():
        yield ALONE
        return
    try:
        store, rank, count = next(dist.rendezvous("env://", timeout=MEETING))
        attempt = dist.PrefixStore(f"attempt-{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)
        gpus = torch.cuda.is_available() and dist.is_nccl_available()
        backend = "cpu:gloo,cuda:nccl" if gpus else "gloo"
        dist.init_process_group(
            backend, store=dist.PrefixStore("group", attempt), rank=rank, world_size=count, timeout=STEP
        )
    except (RuntimeError, ValueError) as error:
        raise BeagleError(
            f"rank {os.environ['RANK']} of {os.environ['WORLD_SIZE']} can't reach the others ({reason_of(error)}); start all of "
            "them with torchrun or accelerate launch, and see that MASTER_ADDR:MASTER_PORT can be reached"
        ) from error
    ranks = Ranks(rank, count, dist.PrefixStore("beagle", attempt))
    if ranks.leads:
        ranks.give_signs_of_life()
    try:
        with _lost_in_a_pass():
            yield ranks
    except (Exception, KeyboardInterrupt) as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # the launcher's, which would end it before its last line
        reports = ranks.stopped() if interrupted else ranks.reports()
        atexit.register(ranks.linger)  # after that line
        if not reports:
            code = 130 if interrupted else error.exit_code if isinstance(error, BeagleError) else 1
            raise SystemExit(code) from None
        raise
    ranks.leave()
    dist.destroy_process_group()
