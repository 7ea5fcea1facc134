"""Trains a draft head on stored states: early stage, then late stage (paper §4.2, A.2, A.3)."""

from __future__ import annotations

import hashlib
import itertools
import json
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TextColumn
from safetensors import SafetensorError
from safetensors.torch import load, save, save_file
from torch import Tensor

from beagle.drafters.block import Block, Layer
from beagle.drafters.checkpoint import HEADS, save_head
from beagle.errors import BeagleError, first_line
from beagle.files import replacing, write_json
from beagle.meta import redact_paths
from beagle.ranks import ALONE, RankLost, Ranks
from beagle.targets.loading import pick_dtype
from beagle.targets.target import Target
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import batches, frequent_tokens, nothing_to_train_on, padded_tokens, samples
from beagle.training.energy import EnergyMeter
from beagle.training.folder import CHECKPOINT, COLUMNS, append_log, cut_log, identity, read_progress
from beagle.training.gradients import Draw, Gradients
from beagle.training.stages import LMHeadWeights, lm_head_rows, stage_loss, step_alpha
from beagle.training.states import StateStore
from beagle.training.vllm_states import StatesLost, VllmStates
from beagle.training.windows import Batch


def new_head(target: Target, config: TrainConfig, options: dict[str, Any]) -> Block:
    """An untrained head for a target, on its device; ``options`` as of ``Trainer``."""
    settings = dict(options)
    kind = HEADS[settings.pop("architecture", "beagle")]
    head = kind(kind.config_class.for_target(target, draft_vocab_size=config.draft_vocab_size, **settings))
    for module in head.modules():
        if isinstance(module, Layer):
            module.dropout = config.dropout
    return head.to(target.device)


def refuse_before_answers(target: Target, out: Path, config: TrainConfig, options: dict[str, Any]) -> None:
    """Find out before the target answers that what comes after it can't be done.

    Raises:
        BeagleError: ``out`` holds a run of other settings; the draft vocabulary is no size; or no head of these
            settings can be built for this target.
    """
    read_progress(out, identity(config, options))
    ends = len([token for token in target.eos_ids if token < target.vocab_size])
    if config.draft_vocab_size is not None and not ends < config.draft_vocab_size <= target.vocab_size:
        raise BeagleError(
            f"train.draft_vocab_size is {config.draft_vocab_size}, but {target.name} has {target.vocab_size} tokens, "
            f"{ends} of which end an answer and are always drafted; choose one from {ends + 1} to {target.vocab_size}"
        )
    try:
        head = new_head(target, config, options)
        target.columns(head.config.kv_layers)
        zeros = torch.zeros(1, 8, target.hidden_size, device=target.device)
        states = torch.zeros(1, 8, head.config.state_size, device=target.device)
        first = torch.zeros(1, dtype=torch.long, device=target.device)
        rows = lm_head_rows(target, first)
        for stage in ("early", "late"):
            batch = Batch(zeros, states, first, first + 6)
            stage_loss(head, batch, rows, config, stage=stage, offset=0, noise=states)
    except (RuntimeError, ValueError, TypeError, LookupError, ArithmeticError, AttributeError) as error:
        raise BeagleError(
            f"no head with these settings can be built for {target.name} ({first_line(error)}); correct the head "
            "section of the recipe"
        ) from error


class Trainer:
    """One training run in one folder; started again, it goes on where its last checkpoint stands.

    Several ranks compute a share of each batch each. Their number changes nothing but the rounding.
    """

    def __init__(
        self,
        target: Target,
        store: StateStore,
        out: Path,
        config: TrainConfig,
        head: dict[str, Any] | None = None,
        ranks: Ranks = ALONE,
        served: VllmStates | None = None,
    ) -> None:
        """
        Args:
            target: the model that is drafted for.
            store: its answers.
            out: folder of the run; rank 0 alone reads and writes it.
            config: settings of the training.
            head: ``architecture`` (default: beagle) and settings of that head's config.
            ranks: the processes that train together.
            served: a server that gives states that are not stored; None: the target computes them.
        Raises:
            BeagleError: there is nothing to train on, the run in ``out`` is another one, or ranks differ in recipe,
                target or answers.
        """
        self.target, self.store, self.out, self.config, self.ranks = target, store, out, config, ranks
        torch.manual_seed(config.seed)
        self.head_options = head or {}
        self.head = new_head(target, config, self.head_options)
        if size := config.draft_vocab_size:
            self.head.draft_vocab.copy_(frequent_tokens(store, size, target.vocab_size, target.eos_ids))
        self.autocast = config.autocast and pick_dtype("auto", target.device) == torch.bfloat16
        self.lm_head = self._lm_head()
        self.served = served
        self.gradients = Gradients(self.head, target, config, ranks, self.autocast, served or list)
        self.optimizer = torch.optim.AdamW(
            self.head.parameters(),
            lr=config.learning_rate,
            betas=config.betas,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.step, self.seconds, self.tokens = 0, 0.0, 0
        self.energy, self.joules = EnergyMeter(), 0.0
        self.epoch, self.at = 0, 0  # the next batch: its epoch, and its place there
        held = sorted(samples(store.shards()[:24], validation=True), key=lambda s: len(s.tokens))
        held = held[:: max(1, math.ceil(len(held) / config.validation_samples))]  # of every length
        self.tried: list[int] = []  # drafts that each of the last step-α is a share of
        self.validation = [held[i : i + 16] for i in range(0, len(held), 16)]
        counted = batches(store, tokens=config.batch_tokens, seed=config.seed, epoch=0, with_states=False)
        if ranks.count > 1:
            counted = iter(self._same_on_all_ranks(list(counted)))
        self.per_epoch = sum(1 for _ in counted)
        if not self.per_epoch:
            raise BeagleError(f"'{store.folder}' {nothing_to_train_on(store)}")
        self.early_steps = round(config.early_epochs * self.per_epoch)
        self.total = self.early_steps + round(config.late_epochs * self.per_epoch)
        if ranks.leads:
            out.mkdir(parents=True, exist_ok=True)
        self._resume()

    def _same_on_all_ranks(self, first: list[list[Sample]]) -> list[list[Sample]]:
        """The batches of the first epoch, which every rank must see alike.

        Raises:
            BeagleError: another rank has others, or another recipe or target.
        """
        order = hashlib.sha256()
        for sample in itertools.chain.from_iterable(first):
            order.update(f"{sample.id} {sample.answer_from} ".encode() + sample.tokens.numpy().tobytes())
        about = {
            "recipe": hashlib.sha256(json.dumps(self.identity(), sort_keys=True).encode()).hexdigest()[:16],
            "target": self.target.digest,
            "data": order.hexdigest()[:16],
        }
        self.ranks.refuse_difference(about, "give all ranks the same recipe, target and data")
        return first

    def _lm_head(self) -> LMHeadWeights:
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

    def train(
        self,
        *,
        seconds: float | None = None,
        report: Callable[[str], None] | None = None,
        track: Callable[[int, dict[str, float]], None] | None = None,
        watch: Callable[[], None] | None = None,
    ) -> list[float]:
        """Train to the end (or for about ``seconds`` of wall time); returns the last step-α.

        Args:
            report: shows a line.
            track: takes a step and what ``log.csv`` says of it.
            watch: called after each step but the last.
        """
        started = time.perf_counter()
        self.head.train()
        alphas: list[float] = []
        self._share_weights()
        columns = (*Progress.get_default_columns(), MofNCompleteColumn(), TextColumn("{task.fields[note]}"))
        with Progress(*columns, console=Console(stderr=True), disable=not self.ranks.leads) as progress:
            task = progress.add_task("training", total=self.total, completed=self.step, note="")
            try:
                while self.step < self.total:
                    stream = batches(
                        self.store, tokens=self.config.batch_tokens, seed=self.config.seed, epoch=self.epoch
                    )
                    left = itertools.islice(stream, self.at, None)
                    for group in self.served.ahead(left, self.ranks.share) if self.served else left:
                        if self.step >= self.total:
                            break
                        loss = self._one(group)
                        last = self.step == self.total
                        if watch and not last:
                            watch()
                        if self.step % self.config.validate_every == 0 or last:
                            alphas = self._validate()
                            logged = self._log(loss, alphas)
                            if track:
                                track(self.step, logged)
                            if report:
                                report(f"step {self.step}: loss {loss:.3f} α {' '.join(f'{a:.3f}' for a in alphas)}")
                        if self.step % self.config.checkpoint_every == 0 or last:
                            self.save()
                        stage = "early" if self.step < self.early_steps else "late"
                        note = f"loss {loss:.3f}" + (f"  α₁ {alphas[0]:.3f}" if alphas else "")
                        progress.update(task, completed=self.step, description=f"{stage} stage", note=note)
                        if seconds is not None and self.ranks.agree_on(time.perf_counter() - started > seconds):
                            self.save()
                            return alphas
                    else:
                        self.epoch, self.at = self.epoch + 1, 0
            except (KeyboardInterrupt, RankLost, StatesLost):
                self.save()
                raise
        alphas = alphas or self._validate()  # none: resumed at its end
        self.head.eval()
        return alphas

    def _validate(self) -> list[float]:
        self.head.eval()
        alphas, self.tried = step_alpha(self.head, self.target, self.validation, 5, self.ranks, self.served or list)
        self.head.train()
        return alphas

    def _one(self, group: list[Sample]) -> float:
        began = time.perf_counter()
        self.energy.lap()
        c = self.config
        shape = (len(group), padded_tokens(group, self.target), self.head.config.state_size)
        random = torch.Generator(device=self.target.device).manual_seed(c.seed * 1_000_003 + self.step)
        noise = torch.randn(shape, generator=random, device=self.target.device)
        for part in self.optimizer.param_groups:
            part["lr"] = self.learning_rate(self.step)
        stage = "early" if self.step < self.early_steps else "late"
        offset = int(torch.randint(c.stage_window(stage), (), generator=random, device=self.target.device))
        shown = self.gradients(group, self.lm_head, Draw(stage, offset, noise, c.seed * 1_000_003 + self.step))
        norm = torch.nn.utils.clip_grad_norm_(self.head.parameters(), c.max_grad_norm)
        if not torch.isfinite(norm):
            raise BeagleError(
                f"the loss diverged at step {self.step}; lower the learning rate and run the command again"
            )
        self.optimizer.step()
        self.step, self.at = self.step + 1, self.at + 1
        self.tokens += sum(len(s.tokens) for s in group)
        self.seconds += time.perf_counter() - began
        self.joules += self.energy.lap()
        return float(shown)

    def _log(self, loss: float, alphas: list[float]) -> dict[str, float]:
        stage = "early" if self.step <= self.early_steps else "late"
        row: list[str | int] = [f"{loss:.4f}", f"{self.seconds:.1f}", self.tokens, *(f"{a:.4f}" for a in alphas)]
        if self.ranks.leads:
            append_log(self.out, [self.step, stage, *row])
        return {name: float(value) for name, value in zip(COLUMNS[2:], row, strict=False)}

    def identity(self) -> dict[str, Any]:
        return identity(self.config, self.head_options)

    def save(self) -> None:
        """Checkpoint everything that a resumed run needs, atomically; rank 0 does."""
        if not self.ranks.leads:
            return
        tensors = {f"head.{k}": v for k, v in self.head.state_dict().items()}
        for i, state in self.optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{i}.{k}": v for k, v in state.items()}
        progress = {
            "step": self.step,
            "seconds": self.seconds,
            "joules": self.joules,
            "tokens": self.tokens,
            "epoch": self.epoch,
            "at": self.at,
            "early_steps": self.early_steps,
            "identity": self.identity(),
        }
        tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
        try:
            with replacing(self.out / CHECKPOINT) as partial:
                save_file(tensors, partial, metadata={"progress": json.dumps(progress)})
        except (OSError, SafetensorError) as error:
            raise BeagleError(
                f"cannot write the checkpoint in '{self.out}': {error}; free space, then run again"
            ) from error

    def _resume(self) -> None:
        found = read_progress(self.out, self.identity()) if self.ranks.leads else None
        progress = self.ranks.agree_on(found)
        if self.ranks.leads:
            cut_log(self.out, progress["step"] if progress else 0)
        if progress is None:
            if self.ranks.leads:
                write_json(self.out / "run.json", self.identity())
            return
        tensors = load(self.ranks.broadcast((self.out / CHECKPOINT).read_bytes() if self.ranks.leads else b""))
        self.head.load_state_dict({k[5:]: v for k, v in tensors.items() if k.startswith("head.")})
        self.lm_head = self._lm_head()
        states: dict[int, dict[str, Tensor]] = {}
        for key, tensor in tensors.items():
            if key.startswith("optimizer."):
                _, index, name = key.split(".")
                states.setdefault(int(index), {})[name] = tensor
        self.optimizer.load_state_dict({"state": states, "param_groups": self.optimizer.state_dict()["param_groups"]})
        self.step, self.seconds, self.tokens = progress["step"], progress["seconds"], progress["tokens"]
        self.joules = progress.get("joules", 0.0)
        self.epoch, self.at = progress["epoch"], progress["at"]
        begun = progress.get("early_steps", self.early_steps)
        if self.step > begun:  # answers that came since then make no late stage early again
            self.total += begun - self.early_steps
            self.early_steps = begun

    def _share_weights(self) -> None:
        """Rank 0's, which may have started from another head."""
        if self.ranks.count > 1:
            weights = {name: tensor.contiguous() for name, tensor in self.head.state_dict().items()}
            self.head.load_state_dict(load(self.ranks.broadcast(save(weights) if self.ranks.leads else b"")))

    def export(self, folder: Path, meta: dict[str, Any]) -> None:
        """Write the head as a draft checkpoint that ``beagle generate --draft`` takes."""
        save_head(self.head, folder, target=redact_paths(self.target.name), dtype=torch.bfloat16, meta=meta)
