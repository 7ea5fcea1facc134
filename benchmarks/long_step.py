"""Memory of a training step over long samples: the whole process at its highest, with the target in bf16.

python benchmarks/long_step.py --config configs/smollm2-135m.yaml --tokens 8192 --json results/long_step.json

The target computes the states itself, as with `states: live`. Tokens are random: memory doesn't depend on them.
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from beagle.evaluation.peak_memory import peak_memory_mb, reset_peak_memory
from beagle.files import write_json
from beagle.meta import command_line, describe
from beagle.ranks import ALONE
from beagle.targets.loading import load_target
from beagle.training.answers import Sample
from beagle.training.data import padded_tokens
from beagle.training.gradients import Draw, Gradients
from beagle.training.recipe import read_recipe
from beagle.training.stages import lm_head_rows
from beagle.training.trainer import new_head

SEED = 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--config", type=Path, required=True)
    parser.add_argument("--tokens", type=int, default=8192, help="of a sample")
    parser.add_argument("--samples", type=int, default=1)
    parser.add_argument("--json", type=Path)
    given = parser.parse_args()
    recipe = read_recipe(given.config)
    target = load_target(given.target, dtype="bfloat16", state_layers=recipe.state_layers)
    torch.manual_seed(SEED)
    head = new_head(target, recipe.train, recipe.head).train()
    optimizer = torch.optim.AdamW(head.parameters(), fused=True)
    gradients = Gradients(head, target, recipe.train, ALONE, recipe.train.autocast)
    weight, bias = lm_head_rows(target, head.draft_vocab)
    random = torch.Generator().manual_seed(SEED)
    tokens = torch.randint(target.vocab_size, (given.samples, given.tokens), generator=random)
    group = [Sample(f"s/{i}", row, None, 0) for i, row in enumerate(tokens)]
    found = {}
    for stage in ("early", "late"):
        before, began = reset_peak_memory(), time.perf_counter()
        noise = torch.randn(given.samples, padded_tokens(group, target), head.config.state_size, generator=random)
        loss = gradients(group, (weight.bfloat16(), bias), Draw(stage, 0, noise, SEED))
        optimizer.step()
        found[stage] = {
            "peak_mb": round(peak_memory_mb()),
            "before_mb": round(before),
            "seconds": round(time.perf_counter() - began, 1),
            "loss": round(float(loss), 4),
        }
        print(stage, found[stage], flush=True)
    about = describe(target) | {"seed": SEED, "command": command_line("python benchmarks/long_step.py")}
    shape = {"samples": given.samples, "tokens": given.tokens, "head": recipe.head, "train": vars(recipe.train)}
    if given.json:
        write_json(given.json, about | shape | {"stages": found})


if __name__ == "__main__":
    main()
