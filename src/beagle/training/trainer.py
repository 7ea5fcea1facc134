"""Trains a draft head on stored states: early stage, then late stage (paper §4.2, A.2, A.3)."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
import torch.nn.functional as F
from pydantic import Field
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beagle.drafters.checkpoint import save_head
from beagle.drafters.head import BeagleHead, HeadConfig
from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.data import Stored, batches, collate, frequent_tokens, samples
from beagle.training.losses import regression, soft_cross_entropy
from beagle.training.states import StateStore, write_json
from beagle.training.windows import Batch, early, late

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]
LMHead = tuple[Tensor, Tensor | None]  # weight [draft_vocab, hidden], bias [draft_vocab]


@dataclass(frozen=True)
class TrainConfig:
    """The paper's values as defaults; our recipes stand in ``configs/``.

    Attributes:
        batch_tokens: padded tokens a step (the paper: 16 sequences).
        window: k. steps: s. noise: scale added to true states given as keys.
        regression: coefficient of the smooth-L1 term.
        dropout: ours, against overfitting where answers are few.
        beta_decay: late-stage weights are β_i = k - i + 1, normalised; off: all equal.
    """

    early_epochs: NotNegative = 10
    late_epochs: NotNegative = 10
    window: Positive = 5
    steps: Positive = 4
    batch_tokens: Positive = 16 * 2048
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.5
    noise: NotNegative = 0.2
    regression: NotNegative = 10.0
    beta_decay: bool = True
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    autocast: bool = False
    draft_vocab_size: Positive | None = None
    validate_every: Positive = 500
    checkpoint_every: Positive = 200
    seed: int = 0

    def __post_init__(self) -> None:
        if self.steps > self.window:
            raise ValueError("steps must not be larger than window (a simulated step is a slot of its window)")


def stage_loss(
    head: BeagleHead, batch: Batch, lm_head: LMHead, config: TrainConfig, *, stage: str, offset: int, noise: Tensor
) -> tuple[Tensor, Tensor]:
    """Loss of one batch (cross-entropy plus regression) and its cross-entropy alone."""
    keys_from = batch.states + config.noise * noise
    if stage == "early":
        parts = [early(head, batch, keys_from, config.window, offset)]
        shares = [1.0]
    else:
        parts = late(head, batch, keys_from, config.window, offset, config.steps)
        betas = [config.window - i + 1 if config.beta_decay else 1 for i in range(1, config.steps + 1)]
        shares = [b / sum(betas) for b in betas]
    predicted, true, weights = [], [], []
    for share, (states, slots, real) in zip(shares, parts, strict=True):
        predicted.append(states[real])
        true.append(batch.pick(batch.states, slots + 1)[real])
        weights.append(torch.full((int(real.sum()),), share, device=states.device) / max(1, int(real.sum())))
    p, t, w = torch.cat(predicted), torch.cat(true), torch.cat(weights)
    cross_entropy = soft_cross_entropy(p, t, lm_head[0], w, lm_head[1])
    if not config.regression:
        return cross_entropy, cross_entropy.detach()
    return cross_entropy + config.regression * regression(p, t, w), cross_entropy.detach()


@torch.no_grad()
def step_alpha(head: BeagleHead, target: Target, groups: list[list[Stored]], steps: int) -> list[float]:
    """α_1 … α_steps of chain drafts from every slot of the validation samples, teacher-forced.

    α_j: share of j-th drafts that equal the target's greedy choice, given that the earlier ones did.
    """
    tried = torch.zeros(steps)
    right = torch.zeros(steps)
    whole, small = lm_head_rows(target), lm_head_rows(target, head.draft_vocab)
    for group in groups:
        batch = collate(group, target)
        for offset in range(steps):
            alive: Tensor | None = None
            for j, (states, slots, real) in enumerate(late(head, batch, batch.states, steps, offset, steps)):
                if alive is not None:
                    real = real & alive
                draft = head.draft_vocab[F.linear(states[real], *small).argmax(-1)]
                truth = F.linear(batch.pick(batch.states, slots + 1)[real], *whole).argmax(-1)
                alive = torch.zeros_like(real)
                alive[real] = draft == truth
                tried[j] += int(real.sum())
                right[j] += int(alive.sum())
    return (right / tried.clamp(min=1)).tolist()


def lm_head_rows(target: Target, index: Tensor | None = None) -> LMHead:
    """Weight and bias of the target's LM head for some tokens, in fp32."""
    weight, bias = target.head_rows(index)
    return weight.float(), None if bias is None else bias.float()


class Trainer:
    """One training run in one folder; started again, it goes on where its last checkpoint stands."""

    def __init__(
        self, target: Target, store: StateStore, out: Path, config: TrainConfig, head: dict[str, Any] | None = None
    ) -> None:
        self.target, self.store, self.out, self.config = target, store, out, config
        torch.manual_seed(config.seed)
        shape = HeadConfig.for_target(target, draft_vocab_size=config.draft_vocab_size, **(head or {}))
        self.head = BeagleHead(shape).to(target.device)
        self.head.dropout = config.dropout
        self.head_options = head or {}
        if shape.draft_vocab_size:
            self.head.draft_vocab.copy_(frequent_tokens(store, shape.draft_vocab_size, target.vocab_size))
        self.lm_head = lm_head_rows(target, self.head.draft_vocab)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step = 0
        self.epoch, self.at = 0, 0  # the next batch: its epoch, and its place there
        self.seconds = 0.0
        self.tokens = 0
        held = sorted(samples(store.shards()[:24], validation=True), key=lambda s: len(s.tokens))
        self.validation = [held[i : i + 16] for i in range(0, min(len(held), 192), 16)]
        self.per_epoch = sum(1 for _ in batches(store, tokens=config.batch_tokens, seed=config.seed, epoch=0))
        if not self.per_epoch:
            raise BeagleError(f"'{store.folder}' holds no answer long enough to train on; give more prompts")
        self.early_steps = round(config.early_epochs * self.per_epoch)
        self.total = self.early_steps + round(config.late_epochs * self.per_epoch)
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def learning_rate(self, step: int) -> float:
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.learning_rate
        done = (step - c.warmup_steps) / max(1, self.total - c.warmup_steps)
        return c.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * done)))

    def train(self, *, seconds: float | None = None, report: Callable[[str], None] | None = None) -> list[float]:
        """Train to the end (or for about ``seconds`` of wall time); returns the last step-α."""
        started = time.perf_counter()
        self.head.train()
        alphas: list[float] = []
        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        with Progress(*columns, console=Console(stderr=True)) as progress:
            task = progress.add_task("training", total=self.total, completed=self.step, note="")
            try:
                while self.step < self.total:
                    stream = batches(
                        self.store, tokens=self.config.batch_tokens, seed=self.config.seed, epoch=self.epoch
                    )
                    for group in itertools.islice(stream, self.at, None):
                        if self.step >= self.total:
                            break
                        loss = self._one(group)
                        last = self.step == self.total
                        if self.step % self.config.validate_every == 0 or last:
                            self.head.eval()
                            alphas = step_alpha(self.head, self.target, self.validation, 5)
                            self.head.train()
                            self._log(loss, alphas)
                            if report:
                                report(f"step {self.step}: loss {loss:.3f} α {' '.join(f'{a:.3f}' for a in alphas)}")
                        if self.step % self.config.checkpoint_every == 0 or last:
                            self.save()
                        stage = "early" if self.step < self.early_steps else "late"
                        note = f"loss {loss:.3f}" + (f"  α₁ {alphas[0]:.3f}" if alphas else "")
                        progress.update(task, completed=self.step, description=f"{stage} stage", note=note)
                        if seconds is not None and time.perf_counter() - started > seconds:
                            self.save()
                            return alphas
                    else:
                        self.epoch, self.at = self.epoch + 1, 0
            except KeyboardInterrupt:
                self.save()
                raise
        self.head.eval()
        if not alphas:  # resumed at its end
            alphas = step_alpha(self.head, self.target, self.validation, 5)
        return alphas

    def _one(self, group: list[Stored]) -> float:
        began = time.perf_counter()
        c = self.config
        batch = collate(group, self.target)
        random = torch.Generator(device=self.target.device).manual_seed(c.seed * 1_000_003 + self.step)
        noise = torch.randn(batch.states.shape, generator=random, device=self.target.device)
        offset = int(torch.randint(c.window, (), generator=random, device=self.target.device))
        for part in self.optimizer.param_groups:
            part["lr"] = self.learning_rate(self.step)
        stage = "early" if self.step < self.early_steps else "late"
        torch.manual_seed(c.seed * 1_000_003 + self.step)  # dropout of a resumed run is that of a whole one
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=c.autocast):
            loss, shown = stage_loss(self.head, batch, self.lm_head, c, stage=stage, offset=offset, noise=noise)
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), c.max_grad_norm)
        if not torch.isfinite(norm):
            raise BeagleError(
                f"the loss diverged at step {self.step}; lower the learning rate and run the command again"
            )
        self.optimizer.step()
        self.step, self.at = self.step + 1, self.at + 1
        self.tokens += sum(len(s.tokens) for s in group)
        self.seconds += time.perf_counter() - began
        return float(shown)

    def _log(self, loss: float, alphas: list[float]) -> None:
        path = self.out / "log.csv"
        new = not path.exists()
        with path.open("a", newline="") as file:
            writer = csv.writer(file)
            if new:
                writer.writerow(["step", "stage", "loss", "seconds", "tokens", *(f"alpha_{j}" for j in range(1, 6))])
            stage = "early" if self.step <= self.early_steps else "late"
            row = [f"{loss:.4f}", f"{self.seconds:.1f}", self.tokens, *(f"{a:.4f}" for a in alphas)]
            writer.writerow([self.step, stage, *row])

    def identity(self) -> dict[str, Any]:
        return json.loads(json.dumps({"train": asdict(self.config), "head": self.head_options}))

    def save(self) -> None:
        """Checkpoint everything that a resumed run needs, atomically."""
        tensors = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "tokens": self.tokens,
            "epoch": self.epoch,
            "at": self.at,
            "identity": self.identity(),
        }
        partial = self.out / ".checkpoint.partial"
        try:
            save_file(
                {k: v.contiguous() for k, v in tensors.items()}, partial, metadata={"progress": json.dumps(progress)}
            )
            os.replace(partial, self.out / "checkpoint.safetensors")
        except (OSError, SafetensorError) as error:
            partial.unlink(missing_ok=True)
            raise BeagleError(
                f"cannot write the checkpoint in '{self.out}': {error}; free space, then run again"
            ) from error

    def _resume(self) -> None:
        from safetensors import safe_open

        path = self.out / "checkpoint.safetensors"
        if not path.is_file():
            write_json(self.out / "run.json", self.identity())
            return
        try:
            with safe_open(path, framework="pt") as file:
                progress = json.loads(file.metadata()["progress"])
            tensors = load_file(path)
        except (OSError, SafetensorError, KeyError, ValueError, TypeError) as error:
            raise BeagleError(f"checkpoint '{path}' is corrupt ({error}); delete it to start over") from error
        if progress["identity"] != self.identity():
            raise BeagleError(f"'{self.out}' holds a run with other settings; choose another --out or delete it")
        self.head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
        self.lm_head = lm_head_rows(self.target, self.head.draft_vocab)
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.seconds, self.tokens = progress["step"], progress["seconds"], progress["tokens"]
        self.epoch, self.at = progress["epoch"], progress["at"]

    def export(self, folder: Path, meta: dict[str, Any]) -> None:
        """Write the head as a draft checkpoint that ``beagle generate --draft`` takes."""
        save_head(self.head, folder, target=self.target.name, dtype=torch.bfloat16, meta=meta)
