"""The target answers many prompts at once, and its hidden states are kept as they come by.

Rows of a fixed batch are refilled as answers end, so long answers don't hold up short ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from beagle.decoding.decoder import Decoder
from beagle.decoding.sampling import Sampler
from beagle.decoding.sampling_params import SamplingParams
from beagle.decoding.sequence import Sequence
from beagle.errors import BeagleError
from beagle.targets.target import Target
from beagle.training.prompts import Prompt, has_template
from beagle.training.recipe import AnswerConfig


@dataclass(frozen=True)
class Sample:
    """One answered turn.

    Attributes:
        id: the prompt's key, a slash and the number of the turn.
        tokens: ``[n]`` int64: prompt and answer, as far as the target has run them. The token that ends the
            answer is none of them; the state before it is there, and is what the end is learned from.
        states: ``[n, state_size]`` hidden states; None where they are computed in training.
        answer_from: first position whose state predicts a token of the answer (prompt length - 1).
    """

    id: str
    tokens: Tensor
    states: Tensor | None
    answer_from: int


def refuse_not_finite(states: Tensor, target: Target, name: str) -> None:
    """Refuse states, of the prompt of this name, some of which are no numbers."""
    if not states.isfinite().all():
        dtype = str(target.dtype).removeprefix("torch.")
        remedy = "copy or download it again" if dtype == "float32" else "load it with dtype float32"
        raise BeagleError(
            f"{name}: the hidden states of {target.name} in {dtype} are NaN or infinite there, and can't be trained on; "
            f"{remedy}"
        )


@dataclass(frozen=True)
class _Job:
    """A turn of a prompt, to be answered."""

    prompt: Prompt
    answers: tuple[str, ...] = ()  # to the turns before this one
    samples: tuple[Sample, ...] = ()  # of the turns before this one: an interrupted dialogue is answered again


class AnswerGenerator:
    """Batched generation with continuous refilling (greedy and sampled answers side by side).

    Whether a prompt's answers are sampled, and how, depends on its content and the seed alone.

    Attributes:
        empty: answers that ended at once.
    """

    def __init__(self, target: Target, config: AnswerConfig) -> None:
        self.target, self.config = target, config
        self.max_turns = config.max_turns if has_template(target) else 1
        self.too_long = self.empty = 0

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Answer every prompt, each turn a sample; turns that are too long are passed over.

        Raises:
            BeagleError: a prompt can't be encoded, or the target's states are not finite (the prompt is named).
        """
        decoder = Decoder(self.target, size=self.config.rows, keep_states=True)
        source = iter(prompts)
        waiting: deque[Sequence] = deque()
        jobs: dict[Sequence, _Job] = {}
        self._refill(waiting, jobs, source)
        for sequence, _ in decoder.run(waiting):
            if sequence.error is not None:
                raise sequence.error
            if sequence.ended:
                job = jobs.pop(sequence)
                yield from self._ended(sequence, job, waiting, jobs)
                self._refill(waiting, jobs, source)

    def _refill(self, waiting: deque[Sequence], jobs: dict[Sequence, _Job], source: Iterator[Prompt]) -> None:
        """Keep enough prompts waiting that some of them are of similar length."""
        while len(waiting) < 4 * self.config.rows:
            prompt = next(source, None)
            if prompt is None:
                return
            self._enqueue(_Job(prompt), waiting, jobs)

    def _enqueue(self, job: _Job, waiting: deque[Sequence], jobs: dict[Sequence, _Job]) -> bool:
        """Whether the turn is short enough to be answered."""
        ids = job.prompt.encode(self.target, job.answers)
        if len(ids) > min(self.config.max_prompt_tokens, self.target.context_limit - 1):
            self.too_long += 1
            return False
        # one more than is trained on: the last is not run, and has no state
        most = min(self.config.max_new_tokens + 1, self.target.context_limit - len(ids))
        temperature, seed = self.config.drawn(job.prompt.key, len(job.answers))
        sampling = SamplingParams(temperature=temperature, seed=seed)
        name = f"{job.prompt.name}: {self.target.name} in {str(self.target.dtype).removeprefix('torch.')}"
        sequence = Sequence(ids, most, Sampler(sampling, eos_ids=self.target.eos_ids, name=name))
        jobs[sequence] = job
        if job.answers:
            waiting.appendleft(sequence)  # few dialogues are unfinished when a run is interrupted
        else:
            waiting.append(sequence)
        return True

    def _sample(self, sequence: Sequence, job: _Job) -> Sample:
        states = torch.cat(sequence.states).to("cpu", torch.bfloat16)
        refuse_not_finite(states, self.target, job.prompt.name)
        return Sample(
            id=f"{job.prompt.key}/{len(job.answers)}",
            tokens=torch.tensor([*sequence.ids, *sequence.tokens[:-1]]),
            states=states,
            answer_from=len(sequence.ids) - 1,
        )

    def _ended(
        self, sequence: Sequence, job: _Job, waiting: deque[Sequence], jobs: dict[Sequence, _Job]
    ) -> tuple[Sample, ...]:
        """Ask the next turn; all samples of the dialogue where there is none."""
        sample = self._sample(sequence, job)
        if len(sequence.tokens) == 1 and sequence.tokens[0] in self.target.eos_ids:
            self.empty += 1  # which teaches nothing
            return job.samples
        samples = (*job.samples, sample)
        if len(job.answers) + 1 < min(len(job.prompt.turns), self.max_turns):
            made = sequence.tokens[:-1] if sequence.tokens[-1] in self.target.eos_ids else sequence.tokens
            text = self.target.tokenizer.decode(made, skip_special_tokens=True)
            if self._enqueue(_Job(job.prompt, (*job.answers, text), samples), waiting, jobs):
                return ()
        return samples
