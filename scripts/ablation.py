"""Short trainings of the head's open choices, side by side on the same stored answers.

Each variant sees the same data once (0.6 epochs early, 0.4 late) from the same seed; what is
compared is step-α on held-out answers. Make the answers with `beagle train` first.

    python scripts/ablation.py --data runs/mine/data --json results/ablation.json
"""

from __future__ import annotations

import argparse
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

from beagle.evaluation.meta import describe
from beagle.targets.loading import load_target
from beagle.training.config import TrainConfig
from beagle.training.pipeline import read_recipe
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer

SHORT: dict[str, Any] = {
    "early_epochs": 0.6, "late_epochs": 0.4, "batch_tokens": 4096, "learning_rate": 1.5e-3,
    "warmup_steps": 40, "validate_every": 10**6, "checkpoint_every": 10**6,
}  # fmt: skip
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "newest state scaled, 9 KV heads": ({}, {}),
    "paper's block: no newest state": ({}, {"newest_state": "none"}),
    "newest state through a matrix": ({}, {"newest_state": "linear"}),
    "3 KV heads (the target's ratio)": ({}, {"num_kv_heads": 3}),
    "batch of 2,048 tokens": ({"batch_tokens": 2048}, {}),
    "batch of 2,048 tokens, learning rate 3e-3": ({"batch_tokens": 2048, "learning_rate": 3e-3}, {}),
    "batch of 1,024 tokens, learning rate 2e-3": ({"batch_tokens": 1024, "learning_rate": 2e-3}, {}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--json", type=Path, required=True)
    parser.add_argument("--config", type=Path, default=Path("configs/smollm2-135m.yaml"))
    arguments = parser.parse_args()
    recipe = read_recipe(arguments.config)
    target = load_target(dtype="float32")
    answers = recipe.answers
    store = StateStore(arguments.data, Fingerprint.of(target, answers.max_prompt_tokens, answers.max_new_tokens))
    rows = {}
    for name, (changes, head) in VARIANTS.items():
        config: TrainConfig = replace(recipe.train, **{**SHORT, **changes})
        with tempfile.TemporaryDirectory() as folder:
            trainer = Trainer(target, store, Path(folder), config, {**recipe.head, **head})
            alphas = trainer.train()
        rows[name] = {
            "step_alpha": [round(a, 4) for a in alphas],
            "parameters": sum(p.numel() for p in trainer.head.parameters()),
            "steps": trainer.step,
            "seconds": round(trainer.seconds, 1),
            "tokens_per_second": round(trainer.tokens / trainer.seconds),
        }
        result = {"variants": rows, "stored_tokens": store.tokens(), "meta": describe(target)}
        arguments.json.write_text(json.dumps(result, indent=1, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
