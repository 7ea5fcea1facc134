"""The numbers of a training run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import Field

from beagle.training.losses import Loss

Positive = Annotated[int, Field(ge=1)]
NotNegative = Annotated[float, Field(ge=0)]


@dataclass(frozen=True)
class TrainConfig:
    """The paper's values as defaults; our recipes stand in ``configs/``.

    Attributes:
        batch_tokens: padded tokens a step (the paper: 16 sequences), of all processes together.
        micro_batch_tokens: padded tokens that a process computes at once, against want of memory; the gradients of larger
            batches are accumulated, which changes them no more than rounding does. None: its share of the batch.
        early_epochs: of the architecture's parallel stage.
        late_epochs: of its simulated one, ``steps`` drafted levels deep (see ``stages.STAGES``).
        window: k.
        steps: s.
        noise: scale added to the hidden states that the head is given.
        early_window: k of the early stage alone (ours). 1 trains every slot as a first draft, of which larger
            windows train one in k; later drafts are then left to the late stage.
        loss: between the draft's distribution and the target's, see ``losses.slot_losses``; the paper has the
            cross-entropy, the others grow with what sampling would reject.
        cross_entropy_share: from 0 to 1, of cross-entropy mixed into another loss.
        regression: coefficient of the smooth-L1 term; 0: none.
        dropout: ours, against overfitting where answers are few.
        autocast: matrix products in bfloat16 where the machine multiplies it (elsewhere nothing changes);
            weights, optimiser and losses stay fp32.
        validation_samples: held-out answers that step-α is measured on, at most.
        beta_decay: late-stage weights are β_i = k - i + 1, normalised; off: all equal.
        step_decay: late-stage weights are step_decay^(i - 1) instead, normalised (EAGLE-3: 0.8); None: ``beta_decay``.
        dpace: late-stage weights follow acceptance in place of all these, see ``losses.dpace_weights``.
    """

    early_epochs: NotNegative = 10
    late_epochs: NotNegative = 10
    window: Positive = 5
    early_window: Positive | None = None
    steps: Positive = 4
    batch_tokens: Positive = 16 * 2048
    micro_batch_tokens: Positive | None = None
    learning_rate: Annotated[float, Field(gt=0)] = 3e-5
    warmup_steps: Annotated[int, Field(ge=0)] = 2000
    schedule: Literal["constant", "cosine"] = "constant"
    betas: tuple[float, float] = (0.9, 0.95)
    weight_decay: NotNegative = 0.0
    max_grad_norm: Annotated[float, Field(gt=0)] = 0.5
    noise: NotNegative = 0.2
    loss: Loss = "cross_entropy"
    cross_entropy_share: Annotated[float, Field(ge=0, le=1)] = 0.0
    regression: NotNegative = 10.0
    beta_decay: bool = True
    step_decay: Annotated[float, Field(gt=0, le=1)] | None = None
    dpace: bool = False
    dropout: Annotated[float, Field(ge=0, lt=1)] = 0.0
    autocast: bool = False
    draft_vocab_size: Positive | None = None
    validate_every: Positive = 500
    validation_samples: Positive = 192
    checkpoint_every: Positive = 200
    seed: int = 0

    def stage_window(self, stage: str) -> int:
        """k of the ``early`` or the ``late`` stage."""
        return self.early_window or self.window if stage == "early" else self.window

    @property
    def step_weights(self) -> list[float]:
        """Weights of the late stage's steps, adding up to 1."""
        steps = range(1, self.steps + 1)
        if self.step_decay is not None:
            weights = [self.step_decay ** (i - 1) for i in steps]
        else:
            weights = [float(self.window - i + 1) if self.beta_decay else 1.0 for i in steps]
        return [weight / sum(weights) for weight in weights]

    def __post_init__(self) -> None:
        if self.steps > self.window:
            raise ValueError("steps must not be larger than window (a simulated step is a slot of its window)")
