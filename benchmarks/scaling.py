"""Draft heads trained on parts of one store of answers, with several losses, and scored on the same held-out answers.

python benchmarks/scaling.py --data runs/mine/data --config configs/smollm2-135m.yaml --dtype bfloat16 \
    --run 0.5/paper --run 0.5/lk --run 2/paper --run 2/lk --whole head --out runs/scaling
python benchmarks/scaling_report.py runs/scaling --json results/scaling.json

A run is a number of million tokens of answers and one of ``LOSSES``. Its part is the first shards of the store in one
random order, so that smaller parts lie in larger ones. The held-out answers come from all of the store, and no part
trains on any of them. Passes over a part follow ``PASSES``, and the stages share them as in the recipe. Parts of up to
``SMALL`` million tokens have smaller batches, so that none lacks steps. Finished runs are kept in ``--out``, which several
processes may share, each with runs of its own.
"""

from __future__ import annotations

import argparse
import math
import random
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from beagle.drafters.checkpoint import find_head, load_head
from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.meta import command_line, describe, redact_paths
from beagle.research.training_log import expected_length, read_log
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import samples
from beagle.training.recipe import Recipe, read_recipe
from beagle.training.stages import step_alpha
from beagle.training.states import StateStore
from beagle.training.trainer import Trainer

PASSES = {0.25: 8.0, 0.5: 5.0, 1: 4.0, 2: 3.0, 4: 2.5, 8: 2.0}  # over parts of up to so many million; else the recipe's
SMALL, SMALL_BATCH = 1.0, 4096
LOSSES: dict[str, dict[str, Any]] = {
    "paper": {},  # the recipe's own
    "tvce": {"loss": "total_variation", "cross_entropy_share": 0.1, "regression": 0.0},
    "lk": {"loss": "lk", "regression": 0.0},
}
DEPTH, HELD_OUT, TOGETHER = 5, 384, 16


class Part(StateStore):
    """The first shards of a store, in a random order that is always the same."""

    def __init__(self, whole: StateStore, count: int) -> None:
        super().__init__(whole.folder, whole.fingerprint, with_states=whole.with_states)
        self.count = count

    def shards(self) -> list[Path]:
        return in_order(super().shards())[: self.count]


def in_order(shards: list[Path]) -> list[Path]:
    return random.Random(0).sample(shards, len(shards))


def answer_tokens(shard: Path) -> int:
    """Tokens of a shard's answers that are trained on."""
    return sum(len(s.tokens) - s.answer_from - 1 for s in samples([shard], validation=False, with_states=False))


def part_of(store: StateStore, tokens: float) -> tuple[Part, int]:
    """The part that holds so many tokens of answers, to the whole shard, and how many these are.

    Raises:
        BeagleError: the store holds fewer.
    """
    found = 0
    for count, shard in enumerate(in_order(store.shards()), 1):
        found += answer_tokens(shard)
        if found >= tokens:
            return Part(store, count), found
    raise BeagleError(f"'{store.folder}' holds {found:,} tokens of answers, not {tokens:,.0f}; give a smaller --run")


def held_out(store: StateStore) -> list[list[Sample]]:
    """Held-out answers from all over the store, of every length, in groups of similar length."""
    found = samples(store.shards(), validation=True)
    found = sorted(found[:: max(1, math.ceil(len(found) / HELD_OUT))], key=lambda s: len(s.tokens))
    return [found[at : at + TOGETHER] for at in range(0, len(found), TOGETHER)]


def settings(recipe: TrainConfig, millions: float, loss: str) -> TrainConfig:
    """The recipe for a part of so many million tokens."""
    own = recipe.early_epochs + recipe.late_epochs
    times = next((passes for most, passes in PASSES.items() if millions <= most), own) / own
    return replace(
        recipe,
        early_epochs=round(recipe.early_epochs * times, 4),
        late_epochs=round(recipe.late_epochs * times, 4),
        batch_tokens=min(recipe.batch_tokens, SMALL_BATCH) if millions <= SMALL else recipe.batch_tokens,
        **LOSSES[loss],
    )


def scored(alphas: Sequence[float], drafts: Sequence[int], held: list[list[Sample]]) -> dict[str, Any]:
    """What a head got on the held-out answers; ``drafts`` are those that each α is a share of."""
    length = round(expected_length(alphas), 4)
    answers = sum(len(group) for group in held)
    return {"step_alpha": [round(a, 4) for a in alphas], "expected_length": length} | {
        "drafts": list(drafts),
        "held_out": answers,
    }


def train(target: Target, store: StateStore, held: list[list[Sample]], recipe: Recipe, name: str, out: Path) -> None:
    """Train one head; head, log and record end in ``out``."""
    size, _, loss = name.partition("/")
    config = settings(recipe.train, float(size), loss)
    part, tokens = part_of(store, float(size) * 1e6)
    trainer = Trainer(target, part, out, config, recipe.head)
    trainer.validation = held  # in place of the part's own
    alphas = trainer.train(report=lambda line: print(f"{name}: {line}", flush=True))
    about = describe(target) | {"command": command_line("python benchmarks/scaling.py")}
    trainer.export(out / "head", about | {"recipe": trainer.identity()})
    record = {
        "loss": loss,
        "answer_tokens": tokens,
        "passes": round(config.early_epochs + config.late_epochs, 3),
        "batch_tokens": config.batch_tokens,
        "steps": trainer.step,
        "trained_tokens": trainer.tokens,
        "train_seconds": round(trainer.seconds, 1),
        **scored(alphas, trainer.tried, held),
        "curve": read_log(out / "log.csv"),
        "recipe": trainer.identity(),
        "meta": about,
    }
    write_json(out / "record.json", record)


def score(target: Target, store: StateStore, held: list[list[Sample]], name: str, out: Path) -> None:
    """A head that all of the store has trained; its record ends in ``out``."""
    head = load_head(find_head(name, target.name), target).float()  # as it trained, and as states come
    about = {"head": redact_paths(name), "answer_tokens": sum(answer_tokens(shard) for shard in store.shards())}
    figures = scored(*step_alpha(head, target, held, DEPTH), held)
    meta = describe(target) | {"command": command_line("python benchmarks/scaling.py")}
    write_json(out / "whole.json", about | figures | {"meta": meta})


def main(words: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, required=True, help="folder of answers that `beagle train` left")
    parser.add_argument("--config", type=Path, required=True, help="recipe")
    parser.add_argument("--run", action="append", default=[], help=f"million tokens/one of {', '.join(LOSSES)}")
    parser.add_argument("--whole", help="a head that all of the store has trained, to be scored; named like --draft")
    parser.add_argument("--target", default="smollm2-135m")
    parser.add_argument("--vocabulary", type=int, default=8192, help="tokens that a head can draft")
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--device", default="auto")
    parser.add_argument("--out", type=Path, required=True, help="folder of the runs")
    arguments = parser.parse_args(words)
    recipe = read_recipe(arguments.config)
    recipe = replace(recipe, train=replace(recipe.train, draft_vocab_size=arguments.vocabulary))
    fingerprint = StateStore.existing(arguments.data).fingerprint
    store = StateStore(arguments.data, fingerprint, with_states=recipe.answers.states == "disk")
    target = load_target(
        arguments.target, dtype=arguments.dtype, device=arguments.device, state_layers=fingerprint.state_layers
    )
    held = held_out(store)
    for name in arguments.run:
        out = arguments.out / name.replace("/", "-")
        if not (out / "record.json").is_file():
            train(target, store, held, recipe, name, out)
    if arguments.whole:
        score(target, store, held, arguments.whole, arguments.out)


if __name__ == "__main__":
    main()
