"""From a command to its first token: `beagle generate` started again and again, in turn with Python alone.

python benchmarks/start_time.py --json results/start.json

What is timed ends with the first byte of the answer; with compiled graphs and measured costs in the cache (run
`beagle compile` and any answer before), as in every start but the first.
"""

from __future__ import annotations

import argparse
import shlex
import subprocess
import sys
import time
from importlib.metadata import distributions
from pathlib import Path
from statistics import median

from beagle.files import write_json
from beagle.meta import command_line, describe

COMMANDS = {
    "beagle generate": ["-m", "beagle", "generate", "hi", "-n", "4"],
    "import torch, transformers": [
        "-c", "import torch, transformers.modeling_utils, transformers.models.auto; print('.', flush=True)"
    ],
}  # fmt: skip


def first_byte(command: list[str]) -> float:
    """Seconds until a command writes to its output."""
    began = time.perf_counter()
    with subprocess.Popen([sys.executable, *command], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        byte = process.stdout.read(1)
        seconds = time.perf_counter() - began
        process.stdout.read()
    if process.returncode or not byte:
        raise SystemExit(f"failed: python {shlex.join(command)}")
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--repeats", type=int, default=8)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--json", type=Path, required=True)
    options = parser.parse_args()
    COMMANDS["beagle generate"] += ["--target", options.target, "--dtype", options.dtype]
    for command in COMMANDS.values():
        first_byte(command)  # files into memory
    seconds: dict[str, list[float]] = {name: [] for name in COMMANDS}
    for _ in range(options.repeats):
        for name, command in COMMANDS.items():
            seconds[name].append(round(first_byte(command), 3))
            print(f"{name}: {seconds[name][-1]:.2f} s")
    result = {
        "seconds_to_first_byte": {name: {"median": median(of), "all": of} for name, of in seconds.items()},
        "packages": len({d.name for d in distributions()}),  # transformers imports some that it finds
        "command": command_line("python benchmarks/start_time.py"),
        "meta": describe(),
    }
    write_json(options.json, result)
    for name, of in seconds.items():
        print(f"{name}: median {median(of):.2f} s")


if __name__ == "__main__":
    main()
