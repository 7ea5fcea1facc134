"""Training tokens a second: two ranks of one core each against one process with two, on the same store, in turns.

python benchmarks/ranks.py --data runs/mine/data --config configs/smollm2-135m.yaml --json results/ranks.json

Each turn is a fresh run of ``beagle train --seconds N`` in a folder of its own. Seconds are those of the run's
steps, so that starting does not count.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from statistics import median
from typing import Any

from beagle.errors import run_script
from beagle.files import read_json, write_json
from beagle.meta import command_line, describe, redact_paths

WAYS = {"one process": (1, 2), "two ranks": (2, 1)}  # processes, and threads of each


def train(words: list[str], processes: int, threads: int, out: Path) -> dict[str, Any]:
    """Steps, tokens and seconds of one run."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "beagle", *words, "--out", str(out)]
    subprocess.run(command, check=True, env={**os.environ, "OMP_NUM_THREADS": str(threads)})
    result = read_json(out / "result.json", "run again") or {}
    return {name: result[name] for name in ("steps", "trained_tokens", "train_seconds")}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True, help="folder of answers and states")
    parser.add_argument("--config", type=Path, required=True, help="recipe; its batches must have work for two")
    parser.add_argument("--seconds", type=float, default=120, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    words = ["train", "--target", arguments.target, "--data", str(arguments.data), "--config", str(arguments.config)]
    words += ["--seconds", str(arguments.seconds)]
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    for _ in range(arguments.repeats):
        for name, (processes, threads) in WAYS.items():
            with tempfile.TemporaryDirectory() as folder:
                runs[name].append(train(words, processes, threads, Path(folder) / "run"))
    speeds = {name: median(run["trained_tokens"] / run["train_seconds"] for run in of) for name, of in runs.items()}
    about = {"command": command_line("python benchmarks/ranks.py"), "data": redact_paths(str(arguments.data))}
    write_json(arguments.json, {"meta": describe() | about, "runs": runs, "tokens_per_second": speeds})
    for name, speed in speeds.items():
        print(f"{name}: {speed:.0f} tokens/s")
    print(f"two ranks over one process: {speeds['two ranks'] / speeds['one process']:.2f}")


if __name__ == "__main__":
    run_script(main)
