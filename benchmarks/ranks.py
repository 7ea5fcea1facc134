"""Training tokens a second: two ranks of one core each against one process with two, on the same store, in turns.

python benchmarks/ranks.py --data runs/mine/data --config configs/smollm2-135m.yaml --json results/ranks.json

Each turn is a fresh run of ``beagle train --seconds N`` in a folder of its own. Seconds are those of the run's
steps, so that starting does not count. The recipe's batches are made smaller (--batch-tokens), since a CPU would
else take minutes for a step, and little is held out, since that is decoded at a run's end.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
from dataclasses import asdict, replace
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from processes import Started

from beagle.errors import BeagleError, run_script
from beagle.files import read_json, write_json
from beagle.meta import command_line, describe, redact_paths
from beagle.training.recipe import Recipe, read_recipe

WAYS = {"one process": (1, 2), "two ranks": (2, 1)}  # processes, and threads of each
BESIDE = 600.0  # most seconds that a run takes beside its training


def train(words: list[str], processes: int, threads: int, out: Path, seconds: float) -> dict[str, Any]:
    """Steps, tokens and seconds of one run.

    Raises:
        BeagleError: it has failed; its own error stands above.
    """
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
    command = [sys.executable, *(launcher if processes > 1 else []), "-m", "beagle", *words, "--out", str(out)]
    # stopped as a launcher wants it, which ends its ranks
    with Started(command, {**os.environ, "OMP_NUM_THREADS": str(threads)}) as run:
        code = run.process.wait(seconds + BESIDE)
    if code:
        raise BeagleError(f"a training with {processes} process(es) has ended with code {code}; see its error above")
    result = read_json(out / "result.json", "run again") or {}
    return {name: result[name] for name in ("steps", "trained_tokens", "train_seconds")}


def smaller(recipe: Recipe, batch_tokens: int) -> str:
    """The recipe as YAML, with other batches, and almost nothing held out."""
    train = replace(recipe.train, batch_tokens=batch_tokens, validation_samples=1)
    return yaml.safe_dump({"answers": asdict(recipe.answers), "train": asdict(train), "head": recipe.head})


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--data", type=Path, required=True, help="folder of answers and states")
    parser.add_argument("--config", type=Path, required=True, help="recipe")
    parser.add_argument("--batch-tokens", type=int, default=2048, help="of both ranks; must have work for two")
    parser.add_argument("--seconds", type=float, default=120, help="of each run")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, required=True)
    arguments = parser.parse_args()
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in WAYS}
    with tempfile.TemporaryDirectory() as folder:
        recipe = Path(folder) / "recipe.yaml"
        recipe.write_text(smaller(read_recipe(arguments.config), arguments.batch_tokens))
        words = ["train", "--target", arguments.target, "--data", str(arguments.data), "--config", str(recipe)]
        words += ["--seconds", str(arguments.seconds)]
        for repeat in range(arguments.repeats):
            for name, (processes, threads) in WAYS.items():
                out = Path(folder) / f"{name} {repeat}".replace(" ", "_")
                runs[name].append(train(words, processes, threads, out, arguments.seconds))
    speeds = {name: median(run["trained_tokens"] / run["train_seconds"] for run in of) for name, of in runs.items()}
    ratio = speeds["two ranks"] / speeds["one process"]
    about = {"command": command_line("python benchmarks/ranks.py"), "data": redact_paths(str(arguments.data))}
    result = {"meta": describe() | about, "runs": runs, "tokens_per_second": speeds, "two_ranks_over_one": ratio}
    write_json(arguments.json, result)
    for name, speed in speeds.items():
        print(f"{name}: {speed:.0f} tokens/s")
    print(f"two ranks over one process: {ratio:.2f}")


if __name__ == "__main__":
    run_script(main)
