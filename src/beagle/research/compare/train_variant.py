"""One variant's training, in a process of its own, with what it costs by stage."""

from __future__ import annotations

import json
import logging
import math
import time
import warnings
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from transformers.utils.logging import disable_progress_bar

import beagle.research.ablations  # noqa: F401  trained in processes of their own, which must know them
from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.meta import describe
from beagle.research.compare.memory_meter import MemoryMeter
from beagle.research.training_log import expected_length, read_log
from beagle.targets.loading import load_target
from beagle.targets.target import Target
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.states import StateStore
from beagle.training.trainer import Trainer

NEVER = 10**9


@dataclass(frozen=True)
class Spec:
    """Everything the process needs.

    Attributes:
        target: arguments of ``load_target``.
        data: folder of answers and states, and the tokens in it.
        out: the run's own folder.
        train: its epochs are shares of the budget where ``seconds`` is set.
        seconds: of training, validation not counted; None: the epochs of ``train``.
    """

    variant: str
    seed: int
    target: dict[str, Any]
    data: Path
    data_tokens: int
    out: Path
    train: TrainConfig
    head: dict[str, Any]
    seconds: float | None = None

    def settings(self) -> dict[str, Any]:
        """What a finished run must have in common with this one to stand for it."""
        about = {"train": asdict(self.train), "head": self.head, "seconds": self.seconds, "target": self.target}
        return {**about, "data_tokens": self.data_tokens}


@dataclass
class Cost:
    """What the steps of one stage took; ``memory_mb`` is their highest above the process before training."""

    steps: int = 0
    tokens: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    memory_mb: float = 0.0


@dataclass
class Costs:
    stages: dict[str, Cost] = field(default_factory=dict)

    def add(self, stage: str, tokens: int, seconds: float, cpu_seconds: float, memory_mb: float) -> None:
        cost = self.stages.setdefault(stage, Cost())
        cost.steps, cost.tokens = cost.steps + 1, cost.tokens + tokens
        cost.seconds, cost.cpu_seconds = cost.seconds + seconds, cost.cpu_seconds + cpu_seconds
        cost.memory_mb = max(cost.memory_mb, memory_mb)


class Measured(Trainer):
    """A training run that notes what each stage costs, and that can end by the clock.

    By the clock, the early stage has its share of ``budget`` seconds, and the learning rate falls with
    the time that has passed: every variant gets the same wall time, whatever it makes of it.
    """

    def __init__(
        self,
        target: Target,
        store: StateStore,
        out: Path,
        config: TrainConfig,
        head: dict[str, Any],
        budget: float | None = None,
    ) -> None:
        super().__init__(target, store, out, config, head)
        self.budget = budget
        self.costs = Costs()
        saved = out / "costs.json"
        if self.step and saved.is_file():
            self.costs = Costs({name: Cost(**cost) for name, cost in json.loads(saved.read_text()).items()})
        if budget is not None:
            self.early_steps = self.total = NEVER
            self._watch_the_clock()
        self.meter = MemoryMeter(target.device)

    def _watch_the_clock(self) -> None:
        if self.budget is None:
            return
        share = self.config.early_epochs / (self.config.early_epochs + self.config.late_epochs)
        if self.early_steps == NEVER and self.seconds >= share * self.budget:
            self.early_steps = self.step
        if self.seconds >= self.budget:
            self.total = self.step

    def done(self, step: int) -> float:
        return super().done(step) if self.budget is None else min(1.0, self.seconds / self.budget)

    def _one(self, group: list[Sample]) -> float:
        stage = "early" if self.step < self.early_steps else "late"
        tokens, seconds, cpu = self.tokens, self.seconds, time.process_time()
        self.meter.peak = -math.inf
        with self.meter.piece():
            loss = super()._one(group)
        self.costs.add(stage, self.tokens - tokens, self.seconds - seconds, time.process_time() - cpu, self.meter.peak)
        self._watch_the_clock()
        return loss

    def save(self) -> None:
        super().save()
        write_json(self.out / "costs.json", {name: asdict(cost) for name, cost in self.costs.stages.items()})


def quiet() -> None:
    """No bars or notes of transformers: a report follows a report."""
    logging.getLogger("transformers").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that downloads keep their bars, as our command wants
        disable_progress_bar()


def train_variant(spec: Spec) -> dict[str, Any]:
    """Train one variant to the end of its budget; its record is also left in ``spec.out/result.json``.

    Raises:
        BeagleError: the data is another target's, or training fails.
    """
    quiet()
    fingerprint = StateStore.existing(spec.data).fingerprint
    target = load_target(**spec.target, state_layers=fingerprint.state_layers)
    store = StateStore(
        spec.data,
        type(fingerprint).of(target, fingerprint.max_prompt_tokens, fingerprint.max_new_tokens, fingerprint.source),
    )
    if store.tokens() != spec.data_tokens:  # or variants would train on other batches
        raise BeagleError(f"'{spec.data}' has changed since the command began; let what fills it end, then run again")
    trainer = Measured(target, store, spec.out, spec.train, spec.head, spec.seconds)
    name = f"{spec.variant}, seed {spec.seed}"
    alphas = trainer.train(report=lambda line: print(f"{name}: {line}", flush=True))
    about = describe(target)
    trainer.export(spec.out / "head", {**about, "recipe": trainer.identity()})
    record: dict[str, Any] = {
        "variant": spec.variant,
        "seed": spec.seed,
        "architecture": trainer.head.architecture.removesuffix("-ablated"),
        "window": spec.train.window,
        "steps": spec.train.steps,
        "parameters": sum(p.numel() for p in trainer.head.parameters()),
        "bytes": (spec.out / "head" / "model.safetensors").stat().st_size,
        "trained_steps": trainer.step,
        "tokens": trainer.tokens,
        "seconds": round(trainer.seconds, 3),
        "joules": round(trainer.joules) if trainer.energy.readable else None,
        "stages": {stage: _figures(cost) for stage, cost in trainer.costs.stages.items()},
        "step_alpha": [round(a, 4) for a in alphas],
        "tried": trainer.tried,
        "expected_length": round(expected_length(alphas), 4),
        "curve": read_log(spec.out / "log.csv"),
        "settings": spec.settings(),
        "meta": about,
    }
    write_json(spec.out / "result.json", record)
    return record


def _figures(cost: Cost) -> dict[str, float]:
    millions = cost.tokens / 1e6
    return {
        "steps": cost.steps,
        "tokens": cost.tokens,
        "seconds_per_million_tokens": round(cost.seconds / millions, 2),
        "cpu_seconds_per_million_tokens": round(cost.cpu_seconds / millions, 2),
        "tokens_per_second": round(cost.tokens / cost.seconds, 1),
        "memory_mb": round(cost.memory_mb, 1),
    }
