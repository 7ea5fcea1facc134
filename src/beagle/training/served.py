"""Whether a head drafts as well when it is served as its training says: held-out prompts are decoded for real."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import stdev
from tempfile import TemporaryDirectory
from typing import Any

import torch

from beagle.decoding.stats import Stats, pooled
from beagle.drafters.base import TreePlan
from beagle.drafters.block import Block
from beagle.drafters.checkpoint import load_head, save_head
from beagle.drafters.head_drafter import HeadDrafter
from beagle.model import Model
from beagle.targets.target import Target
from beagle.training.answers import Sample
from beagle.training.stages import draft_chains

DEPTH = 5  # of the chains, as in validation
PROMPTS = 12  # most held-out prompts that are decoded
FEW = 4  # of them, each minute
MINUTE = 60.0  # seconds
TOKENS = 64  # most tokens of each answer
ERRORS = 3  # standard errors, and
SHARE = 0.05  # of the simulated length, beyond both of which a gap is no noise
CAUSES = (
    "likely causes: the states or answers trained on are of another model, dtype, quantisation or chat template than "
    "the target is loaded with now; few or hardly greedy answers (answers.sampled_share, answers.source: given); weights "
    "that lose much when they are rounded to bfloat16"
)


@dataclass(frozen=True)
class Served:
    """Chains of drafts from the beginning of each held-out answer, simulated by the training's code and decoded.

    Attributes:
        simulated: tokens per pass of the walk through the stored answers, with their stored states.
        tau: tokens per pass where the answers are decoded with the exported head.
        step_alpha: of the decoded passes.
        error: standard error of the difference; None: too few prompts to know.
    """

    prompts: int
    depth: int
    simulated: float
    tau: float
    step_alpha: list[float]
    error: float | None

    @property
    def falls_short(self) -> bool:
        """Whether the head drafts worse than simulated, beyond noise. It may draft better: greedy answers are easier."""
        return self.error is not None and self.simulated - self.tau > max(ERRORS * self.error, SHARE * self.simulated)

    def lines(self, validation: list[float]) -> list[str]:
        noise = "" if self.error is None else f" ± {self.error:.2f}"
        return [
            f"step-α of validation {_row(validation)}; of {self.prompts} held-out prompts decoded {_row(self.step_alpha)}",
            f"τ of chains of {self.depth}: simulated {self.simulated:.2f}, decoded {self.tau:.2f}{noise}",
        ]

    def as_dict(self) -> dict[str, Any]:
        rounded = {"simulated": round(self.simulated, 3), "tau": round(self.tau, 3)}
        error = None if self.error is None else round(self.error, 4)
        alphas = [round(alpha, 4) for alpha in self.step_alpha]
        return {**asdict(self), **rounded, "step_alpha": alphas, "error": error, "falls_short": self.falls_short}


def measure_served(trained: Block, folder: Path, target: Target, held_out: list[Sample]) -> Served | None:
    """Decode held-out prompts with the exported head, and compare with the trained one in its training's code.

    Returns:
        None if there are none.
    """
    some = shortened(held_out)
    if not some:
        return None
    trained.eval()  # a run that the clock has stopped was still training
    simulated = [walk for sample in some for walk in simulate(trained, target, [sample])]
    answers = decode(folder, target, some)
    total = pooled(answers)
    decoded = [(stats.passed_tokens, stats.passes) for stats in answers]
    return Served(len(some), DEPTH, _ratio(simulated), total.tau, total.step_alpha, _error(simulated, decoded))


def shortened(held_out: list[Sample], most: int = PROMPTS) -> list[Sample]:
    """Some held-out samples, spread over all, with the beginnings of their answers."""
    some = held_out[:: max(1, -(-len(held_out) // most))]
    ends = [sample.answer_from + 1 + TOKENS for sample in some]
    return [
        replace(sample, tokens=sample.tokens[:end], states=None if sample.states is None else sample.states[:end])
        for sample, end in zip(some, ends, strict=True)
    ]


def decode(folder: Path, target: Target, samples: list[Sample]) -> list[Stats]:
    """The samples' prompts answered greedily, as long as the samples are, with chains of an exported head's drafts.

    Of the tokens that the head was trained to draft alone: native drafts have the answer's own, too.
    """
    drafter = HeadDrafter(target, load_head(folder, target))
    model = Model(target, drafter, TreePlan("chain", DEPTH, 1, DEPTH))
    found = []
    for sample in samples:
        prompt, new = sample.tokens[: sample.answer_from + 1].tolist(), len(sample.tokens) - sample.answer_from
        found.append(model.generate(prompt, max_new_tokens=new).stats)
    return found


def tau_of(folder: Path, target: Target, held_out: list[Sample], most: int = PROMPTS) -> float | None:
    """Tokens per pass of up to ``most`` held-out prompts with an exported head; None: there are none."""
    total = pooled(decode(folder, target, shortened(held_out, most)))
    return total.tau if total.passes else None


class EachMinute:
    """Shows τ on a few held-out prompts, now and after each minute of training."""

    def __init__(self, head: Block, target: Target, held_out: list[Sample], show: Callable[[str], None]) -> None:
        self.head, self.target, self.held_out, self.show = head, target, held_out, show
        self.trained = 0.0
        self._measure()
        self.since = time.perf_counter()

    def __call__(self) -> None:
        """A step has been made."""
        passed = time.perf_counter() - self.since
        if passed < MINUTE:
            return
        self.trained += passed
        self._measure()
        self.since = time.perf_counter()  # measuring trains nothing

    def _measure(self) -> None:
        with TemporaryDirectory() as folder:
            save_head(self.head, folder, target=self.target.name, dtype=torch.bfloat16, meta={})
            tau = tau_of(Path(folder), self.target, self.held_out, FEW)
        if tau is not None:
            few = len(shortened(self.held_out, FEW))
            self.show(f"after {self.trained / 60:.1f} minutes of training: τ {tau:.2f} on {few} held-out prompts")


def simulate(head: Block, target: Target, group: list[Sample]) -> list[tuple[int, int]]:
    """Tokens after the first, and passes, of each answer if chains drafted by the training's code led through it."""
    longest = max(len(sample.tokens) for sample in group)
    accepted = torch.zeros(len(group), longest, dtype=torch.long)
    for j, slots, _, right in draft_chains(head, target, group, DEPTH):
        rows, at = right.nonzero(as_tuple=True)
        accepted[rows.cpu(), (slots[rows, at] - j).cpu()] = j + 1
    walks = []
    for own, sample in zip(accepted.tolist(), group, strict=True):
        slot, passes, end = sample.answer_from, 0, len(sample.tokens) - 1
        while slot < end:
            slot += own[slot] + 1
            passes += 1
        walks.append((end - sample.answer_from, passes))
    return walks


def _ratio(walks: list[tuple[int, int]]) -> float:
    return sum(tokens for tokens, _ in walks) / max(1, sum(passes for _, passes in walks))


def _error(one: list[tuple[int, int]], other: list[tuple[int, int]]) -> float | None:
    """Standard error of the difference of two ratios over the same prompts; None: fewer than four."""
    if len(one) < 4:
        return None
    parts = []
    for walks in (one, other):
        ratio, mean = _ratio(walks), max(1e-9, sum(passes for _, passes in walks) / len(walks))
        parts.append([(tokens - ratio * passes) / mean for tokens, passes in walks])
    return stdev(a - b for a, b in zip(*parts, strict=True)) / len(one) ** 0.5


def _row(alphas: list[float]) -> str:
    return " ".join(f"{alpha:.2f}" for alpha in alphas[:DEPTH]) or "none"
