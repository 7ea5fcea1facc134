"""Peak memory and time of the late stage against the early stage and against one simulated step.

Each setting runs in a process of its own, on random states in the shape of SmolLM2-135M's head
(memory and time don't depend on what the numbers are), and the settings are interleaved.

    python scripts/late_stage_cost.py --json results/late_stage_cost.json
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import time
from pathlib import Path
from statistics import median

# name: stage, steps, window. With a window of 4, one step supervises a quarter of the slots that four
# do; with k = s every setting supervises every slot once.
SETTINGS = {
    "early, k=4": ("early", 4, 4),
    "late, s=1, k=4": ("late", 1, 4),
    "late, s=4, k=4": ("late", 4, 4),
    "late, s=1, k=1": ("late", 1, 1),
    "late, s=2, k=2": ("late", 2, 2),
}


def one(stage: str, steps: int, window: int) -> dict[str, float]:
    """Seconds a step and peak resident memory of one setting, forward and backward."""
    import torch

    from beagle.drafters.head import BeagleHead, HeadConfig
    from beagle.evaluation.meta import peak_memory_mb, reset_peak_memory
    from beagle.training.config import TrainConfig
    from beagle.training.stages import stage_loss
    from beagle.training.windows import Batch

    torch.manual_seed(0)
    config = HeadConfig(576, 9, 9, 64, 1536, 49152, draft_vocab_size=8192)
    head = BeagleHead(config)
    lm_head = torch.randn(8192, 576) * 0.02
    rows, n, prompt = 16, 256, 96
    shape = (rows, n, 576)
    last = torch.full((rows,), n - 2)
    batch = Batch(torch.randn(shape), torch.randn(shape), torch.full((rows,), prompt), last)
    settings = TrainConfig(window=window, steps=steps, regression=0.1, draft_vocab_size=8192)
    times = []
    for i in range(7):
        if i == 2:
            reset_peak_memory()
        began = time.perf_counter()
        loss, _ = stage_loss(
            head, batch, (lm_head, None), settings, stage=stage, offset=i % window, noise=torch.randn(shape)
        )
        loss.backward()
        head.zero_grad(set_to_none=True)
        times.append(time.perf_counter() - began)
    return {"seconds": median(times[2:]), "peak_mb": peak_memory_mb()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--one", nargs=3)
    arguments = parser.parse_args()
    if arguments.one:
        print(json.dumps(one(arguments.one[0], int(arguments.one[1]), int(arguments.one[2]))))
        return
    from beagle.evaluation.meta import describe

    found: dict[str, list[dict[str, float]]] = {name: [] for name in SETTINGS}
    for _ in range(arguments.rounds):
        for name, (stage, steps, window) in SETTINGS.items():
            command = [sys.executable, __file__, "--json", "-", "--one", stage, str(steps), str(window)]
            out = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            found[name].append(json.loads(out))
    table = {
        name: {key: round(median(run[key] for run in runs), 3) for key in ("seconds", "peak_mb")}
        for name, runs in found.items()
    }

    def over(a: str, b: str, what: str) -> float:
        return round(table[a][what] / table[b][what], 3)

    result = {
        "settings": table,
        "memory, s=4 over s=1, all slots": over("late, s=4, k=4", "late, s=1, k=1", "peak_mb"),
        "memory, s=4 over s=1, k=4": over("late, s=4, k=4", "late, s=1, k=4", "peak_mb"),
        "time, late s=4 over early": over("late, s=4, k=4", "early, k=4", "seconds"),
        "meta": describe(),
    }
    arguments.json.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
