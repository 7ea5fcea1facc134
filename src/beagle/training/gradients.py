"""The gradients of one batch, computed at once, in parts one after the other, and by several ranks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from beagle.drafters.block import Block, Layer
from beagle.errors import BeagleError
from beagle.ranks import Ranks
from beagle.targets.target import Target
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import collate
from beagle.training.stages import STAGES, Fill, LMHeadWeights, count_slots, part_loss


@dataclass(frozen=True)
class Draw:
    """What a step has drawn, for its whole batch.

    Attributes:
        stage: ``early`` or ``late``.
        offset: of the windows.
        noise: ``[samples, n, state_size]``; n is what the samples are padded to.
        seed: of the dropout.
    """

    stage: str
    offset: int
    noise: Tensor
    seed: int


class Gradients:
    """Computes a batch on this rank, its share of it, and leaves the gradients of all of it on the head.

    A part is padded as the whole batch is, and takes its rows of the noise and dropout that were drawn for the whole. So
    neither the number of ranks nor the size of a part changes anything but the rounding.
    """

    def __init__(
        self, head: Block, target: Target, config: TrainConfig, ranks: Ranks, autocast: bool, fill: Fill = list
    ) -> None:
        """
        Args:
            head: that is trained.
            target: that it drafts for.
            config: of the training.
            ranks: that compute each batch together.
            autocast: multiply in bfloat16.
            fill: gives samples their states; by default those without any get the target's own, see ``collate``.
        Raises:
            BeagleError: this kind of head can't be computed in parts, and is to be.
        """
        if STAGES[type(head)].unrolled is None and (ranks.count > 1 or config.micro_batch_tokens):
            raise BeagleError(
                "the batches of this head can't be computed in parts; train it in one process, without "
                "micro_batch_tokens"
            )
        self.head, self.target, self.config, self.ranks, self.autocast = head, target, config, ranks, autocast
        self.fill = fill
        self.columns = target.columns(head.config.kv_layers)
        self.layers = [module for module in head.modules() if isinstance(module, Layer)]
        self.parameters = list(head.parameters())

    def __call__(self, group: Sequence[Sample], lm_head: LMHeadWeights, draw: Draw) -> Tensor:
        """The loss of a batch, without the regression; its gradients are on the head then, the same on all ranks.

        Args:
            group: samples of the whole batch.
            lm_head: rows of the target's LM head.
            draw: what the step has drawn.
        """
        for parameter in self.parameters:
            parameter.grad = None
        parts = self._parts(len(group), draw.noise.shape[1])
        if not self.ranks.divide and parts == [slice(0, len(group))]:
            shown, _ = self._part(group, lm_head, draw)
        else:
            shown = self._in_parts(group, parts, lm_head, draw)
        return shown

    def _parts(self, samples: int, n: int) -> list[slice]:
        """This rank's samples, as many at a time as may be computed at once."""
        mine = self.ranks.share(samples)
        most = max(1, self.config.micro_batch_tokens // n) if self.config.micro_batch_tokens else samples
        return [slice(at, min(at + most, mine.stop)) for at in range(mine.start, mine.stop, most)]

    def _in_parts(self, group: Sequence[Sample], parts: list[slice], lm_head: LMHeadWeights, draw: Draw) -> Tensor:
        first = torch.tensor([s.answer_from for s in group])
        last = torch.tensor([len(s.tokens) - 2 for s in group])
        longest = int((last - first).max()) + 1
        counts = count_slots(self.head, first, last, self.config, stage=draw.stage, offset=draw.offset)
        shown, weight = torch.zeros(2, device=draw.noise.device)
        try:
            for part in parts:
                for layer in self.layers:
                    layer.part = (part, len(group))
                own = replace(draw, noise=draw.noise[part])
                values = self._part(group[part], lm_head, own, longest, counts)
                shown, weight = shown + values[0], weight + values[1]
        finally:
            for layer in self.layers:
                layer.part = None
        return self._sum(shown, weight, divide=self.config.dpace and draw.stage == "late")

    def _part(
        self,
        group: Sequence[Sample],
        lm_head: LMHeadWeights,
        draw: Draw,
        longest: int | None = None,
        counts: Sequence[int] | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Add the gradients of some samples; gives their loss and weight, see ``part_loss``."""
        batch = replace(collate(self.fill(group), self.target, self.columns, draw.noise.shape[1]), longest=longest)
        torch.manual_seed(draw.seed)  # dropout of a resumed run is that of a whole one
        with torch.autocast(self.target.device.type, torch.bfloat16, enabled=self.autocast):
            loss, shown, weight = part_loss(
                self.head, batch, lm_head, self.config,
                stage=draw.stage, offset=draw.offset, noise=draw.noise, counts=counts,
            )  # fmt: skip
        loss.backward()
        return shown, weight

    def _sum(self, shown: Tensor, weight: Tensor, *, divide: bool) -> Tensor:
        """Sum gradients and loss over all ranks.

        Args:
            shown: this rank's part of the loss.
            weight: of it.
            divide: by the weight of all ranks.
        """
        of = self.parameters
        used = torch.tensor([p.grad is not None for p in of], dtype=shown.dtype, device=shown.device)
        gradients = [torch.zeros_like(p) if p.grad is None else p.grad for p in of]
        self.ranks.sum([*gradients, used, shown, weight])
        for parameter, gradient, by in zip(of, gradients, used.tolist(), strict=True):
            parameter.grad = gradient if by else None  # the optimiser leaves alone what no rank has used
            if by and divide:
                gradient /= weight
        return shown / weight if divide else shown
