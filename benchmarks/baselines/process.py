"""An engine in a process of its own, which answers a line of JSON with a line of JSON."""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.evaluation.modes import Options, System
from beagle.targets.chat import Message, encode


class Missing(Exception):
    """Why an engine can't be measured here."""


@dataclass(frozen=True)
class ProcessSystem(System):
    """``model`` has the tokenizer only; ``about``: version and build, as the engine tells them."""

    process: Any = None
    log: Path = Path()
    about: str = ""

    def answer(self, prompt: str | Sequence[Message], options: Options, seed: int) -> tuple[list[int], Stats]:
        """Greedy; the time of its passes as it measures it itself."""
        target = self.model.target
        ends = sorted(target.eos_ids)
        asked = {"ids": encode(target, prompt), "limit": options.max_new_tokens, "ends": ends}
        with contextlib.suppress(BrokenPipeError):  # the missing answer tells
            print(json.dumps(asked), file=self.process.stdin, flush=True)
        said = self.process.stdout.readline()
        if not said:
            raise BeagleError(f"{self.mode} has ended: {last_line(self.log)}; leave it out with --only")
        told = json.loads(said)
        made = len(told["ids"])
        stats = Stats(tokens=made, passes=told["passes"], passed_tokens=made - 1)
        stats.prefill_seconds, stats.decode_seconds = told["prefill"], told["decode"]
        return told["ids"], stats

    def close(self) -> None:
        self.process.stdin.close()
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.process.kill()


def start(mode: str, command: Sequence[Any], environment: Mapping[str, str], beside: System) -> ProcessSystem:
    """Start an engine and wait until it is ready.

    Args:
        command: its words; a dictionary becomes JSON.
        beside: whose target's tokenizer makes the prompts.
    Raises:
        Missing: it doesn't start.
    """
    words = [json.dumps(word) if isinstance(word, dict) else str(word) for word in command]
    handle, name = tempfile.mkstemp(suffix=".log")
    log: IO[bytes]
    with os.fdopen(handle, "wb") as log:
        try:
            process = subprocess.Popen(
                words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=log, text=True,
                env={**os.environ, **environment},
            )  # fmt: skip
        except OSError as error:
            raise Missing(f"'{words[0]}' can't be started: {error.strerror}") from error
    assert process.stdout is not None
    ready = process.stdout.readline()
    if not ready:
        process.wait()
        raise Missing(f"did not start: {last_line(Path(name))}")
    return ProcessSystem(mode, beside.model, process=process, log=Path(name), about=json.loads(ready)["about"])


def last_line(log: Path) -> str:
    """The last line that names an error, or the last of all."""
    lines = [line.strip() for line in log.read_text(errors="replace").splitlines() if line.strip()]
    errors = [line for line in lines if "Error" in line]
    return (errors or lines or ["it said nothing"])[-1]
