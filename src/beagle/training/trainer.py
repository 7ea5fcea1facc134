"""Trains a draft head on stored states: early stage, then late stage (paper §4.2, A.2, A.3)."""

from __future__ import annotations

import csv
import itertools
import json
import math
import os
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from beagle.drafters.checkpoint import save_head
from beagle.errors import BeagleError
from beagle.files import write_json
from beagle.targets.loading import pick_dtype
from beagle.targets.target import Target
from beagle.training.config import TrainConfig
from beagle.training.data import Stored, batches, collate, frequent_tokens, samples
from beagle.training.stages import ARCHITECTURES, LMHead, lm_head_rows, stage_loss, step_alpha
from beagle.training.states import StateStore


class Trainer:
    """One training run in one folder; started again, it goes on where its last checkpoint stands."""

    def __init__(
        self, target: Target, store: StateStore, out: Path, config: TrainConfig, head: dict[str, Any] | None = None
    ) -> None:
        """
        Args:
            head: ``architecture`` (default: beagle) and settings of that head's config.
        """
        self.target, self.store, self.out, self.config = target, store, out, config
        torch.manual_seed(config.seed)
        self.head_options = head or {}
        settings = dict(self.head_options)
        kind = ARCHITECTURES[settings.pop("architecture", "beagle")].head
        shape = kind.config_class.for_target(target, draft_vocab_size=config.draft_vocab_size, **settings)
        self.head = kind(shape).to(target.device)
        self.head.dropout = config.dropout
        if shape.draft_vocab_size:
            self.head.draft_vocab.copy_(frequent_tokens(store, shape.draft_vocab_size, target.vocab_size))
        self.autocast = config.autocast and pick_dtype("auto", target.device) == torch.bfloat16
        self.lm_head = self._lm_head()
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
        held = held[:: max(1, math.ceil(len(held) / config.validation_samples))]  # of every length
        self.tried: list[int] = []  # drafts that each of the last step-α is a share of
        self.validation = [held[i : i + 16] for i in range(0, len(held), 16)]
        self.per_epoch = sum(1 for _ in batches(store, tokens=config.batch_tokens, seed=config.seed, epoch=0))
        if not self.per_epoch:
            raise BeagleError(f"'{store.folder}' holds no answer long enough to train on; give more prompts")
        self.early_steps = round(config.early_epochs * self.per_epoch)
        self.total = self.early_steps + round(config.late_epochs * self.per_epoch)
        out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _lm_head(self) -> LMHead:
        """In the dtype of products: autocast would cast it for each of them, since it keeps only what is trained."""
        weight, bias = lm_head_rows(self.target, self.head.draft_vocab)
        return (weight.bfloat16() if self.autocast else weight), bias

    def learning_rate(self, step: int) -> float:
        c = self.config
        if step < c.warmup_steps:
            return c.learning_rate * (step + 1) / c.warmup_steps
        if c.schedule == "constant":
            return c.learning_rate
        return c.learning_rate * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * self.done(step))))

    def done(self, step: int) -> float:
        """Share of the run after its warm-up that lies before ``step``."""
        return (step - self.config.warmup_steps) / max(1, self.total - self.config.warmup_steps)

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
                            alphas, self.tried = step_alpha(self.head, self.target, self.validation, 5)
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
            alphas, self.tried = step_alpha(self.head, self.target, self.validation, 5)
        return alphas

    def _one(self, group: list[Stored]) -> float:
        began = time.perf_counter()
        c = self.config
        batch = collate(group, self.target)
        random = torch.Generator(device=self.target.device).manual_seed(c.seed * 1_000_003 + self.step)
        noise = torch.randn(batch.states.shape, generator=random, device=self.target.device)
        for part in self.optimizer.param_groups:
            part["lr"] = self.learning_rate(self.step)
        stage = "early" if self.step < self.early_steps else "late"
        offset = int(torch.randint(c.stage_window(stage), (), generator=random, device=self.target.device))
        torch.manual_seed(c.seed * 1_000_003 + self.step)  # dropout of a resumed run is that of a whole one
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.autocast):
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
        saved = progress["identity"]
        defaults = json.loads(json.dumps(asdict(TrainConfig())))
        saved["train"] = {**defaults, **saved["train"]}  # an option younger than the run stood at its default
        if saved != self.identity():
            raise BeagleError(f"'{self.out}' holds a run with other settings; choose another --out or delete it")
        self.head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
        self.lm_head = self._lm_head()
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
