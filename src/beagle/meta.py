"""Where and how a figure was made: machine, versions, revision, date."""

from __future__ import annotations

import datetime
import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Iterable, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch

from beagle.drafters.base import Drafter
from beagle.drafters.small import PREFIX
from beagle.targets.target import Target


def describe(target: Target | None = None, drafters: Iterable[Drafter | None] = ()) -> dict[str, Any]:
    """Everything a reader needs to judge or repeat a measurement."""
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    about: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "cpu": _cpu(),
            "cores": os.cpu_count(),
            "memory_gib": round(memory, 1),
            "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
            "threads": torch.get_num_threads(),
            "system": platform.system(),
        },
        "versions": {
            "python": platform.python_version(),
            **{name: _version(name) for name in ("torch", "transformers", "beagle-decoding")},
        },
        "revision": revision(),
    }
    if target is not None:
        about["target"] = {"name": redact_paths(target.name), "dtype": str(target.dtype).removeprefix("torch.")}
        if target.quantize:
            about["target"]["quantize"] = target.quantize
        if target.compiled is not None:
            about["target"][target.compiled.runner.name] = True
            if "trees" in target.compiled.runner.kinds:
                about["target"][f"{target.compiled.runner.name}_batches"] = True
    if names := sorted({drafter.name for drafter in drafters if drafter}):
        about["drafters"] = [redact_paths(name) for name in names]
    return about


def command_line(program: str = "beagle", words: Sequence[str] | None = None) -> str:
    """The command that runs, as anyone can repeat it; ``words`` after the program are those of this process if None."""
    return shlex.join([*program.split(), *map(redact_paths, sys.argv[1:] if words is None else words)])


def redact_paths(word: str) -> str:
    """A word of the command line without the folders of this machine."""
    if word.startswith(PREFIX):
        return PREFIX + redact_paths(word.removeprefix(PREFIX))
    data = os.environ.get("BEAGLE_DATA")
    if data and word.startswith(data):
        return "$BEAGLE_DATA" + word.removeprefix(data.rstrip("/"))
    name, is_named, value = word.partition("=/")
    if is_named and name.isidentifier():
        return f"{name}={redact_paths('/' + value)}"
    return Path(word).name if word.startswith("/") else word


def _version(package: str) -> str | None:
    """None: it runs from its source, without having been installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = dict(line.split(":", 1) for line in lines[:40] if ":" in line)
    fields = {key.strip(): value.strip() for key, value in names.items()}
    return f"{fields.get('model name', platform.machine())}, model {fields.get('model', '?')}"


def revision() -> str | None:
    """Git revision of the working tree this package runs from, ``+`` if it has changes."""
    try:
        here = Path(__file__).parent
        head = subprocess.run(["git", "rev-parse", "--short=12", "HEAD"], cwd=here, capture_output=True, text=True)
        if head.returncode:
            return None
        status = subprocess.run(["git", "status", "--porcelain", "-uno"], cwd=here, capture_output=True, text=True)
        return head.stdout.strip() + ("+" if status.stdout.strip() else "")
    except OSError:
        return None
