"""The target answers many prompts at once, and its true states are kept as they come by.

Rows of a fixed batch are refilled as answers end, so long answers don't hold up short ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from beagle.decoding.batch import Batch, Row
from beagle.decoding.sampling import Sampler
from beagle.targets.chat import Message, encode
from beagle.targets.target import Target
from beagle.training.prompts import Prompt


@dataclass(frozen=True)
class Sample:
    """One answered turn.

    Attributes:
        tokens: ``[n]`` int64: prompt and answer, as far as the target has run them.
        states: ``[n, hidden]`` true states.
        answer_from: first position whose state predicts a token of the answer (prompt length - 1).
    """

    id: str
    tokens: Tensor
    states: Tensor
    answer_from: int


@dataclass(frozen=True)
class _Job:
    """A turn of a prompt, to be answered."""

    prompt: Prompt
    temperature: float
    turn: int = 0
    before: list[Message] = field(default_factory=list)


class AnswerGenerator:
    """Batched generation with continuous refilling (greedy and sampled rows side by side)."""

    def __init__(
        self,
        target: Target,
        *,
        rows: int = 96,
        max_prompt_tokens: int = 384,
        max_new_tokens: int = 192,
        max_turns: int = 2,
        sampled_share: float = 0.25,
        temperature: float = 0.7,
        seed: int = 0,
    ) -> None:
        self.target = target
        self.rows = rows
        self.max_prompt_tokens = max_prompt_tokens
        self.max_new_tokens = max_new_tokens
        self.max_turns = max_turns
        self.sampled_share = sampled_share
        self.temperature = temperature
        self.random = torch.Generator().manual_seed(seed)

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Answer every prompt, each turn a sample; prompts that are too long are passed over."""
        slots = self.max_prompt_tokens + self.max_new_tokens + 1
        batch = Batch(self.target, rows=self.rows, slots=slots, keep_states=True)
        source = iter(prompts)
        waiting: deque[Row] = deque()
        jobs: dict[Row, _Job] = {}
        self._refill(waiting, jobs, source)
        for row, _ in batch.run(waiting):
            if row.ended:
                job = jobs.pop(row)
                if len(row.tokens) > 1 or row.tokens[0] not in self.target.eos_ids:  # an empty answer teaches nothing
                    yield self._sample(row, job)
                    self._next_turn(row, job, waiting, jobs)
                self._refill(waiting, jobs, source)

    def _refill(self, waiting: deque[Row], jobs: dict[Row, _Job], source: Iterator[Prompt]) -> None:
        """Keep enough prompts waiting that some of them are of similar length."""
        while len(waiting) < 4 * self.rows:
            prompt = next(source, None)
            if prompt is None:
                return
            sampled = float(torch.rand((), generator=self.random)) < self.sampled_share
            self._enqueue(_Job(prompt, self.temperature if sampled else 0.0), waiting, jobs)

    def _enqueue(self, job: _Job, waiting: deque[Row], jobs: dict[Row, _Job]) -> None:
        ids = encode(self.target, [*job.before, {"role": "user", "content": job.prompt.turns[job.turn]}])
        if len(ids) > min(self.max_prompt_tokens, self.target.context_limit - 1):
            return
        seed = int(torch.randint(2**62, (), generator=self.random))
        most = min(
            self.max_new_tokens + 1, self.target.context_limit - len(ids)
        )  # the last is not run: it has no state
        row = Row(ids, most, Sampler(temperature=job.temperature, seed=seed, length=most))
        jobs[row] = job
        waiting.append(row)

    def _sample(self, row: Row, job: _Job) -> Sample:
        return Sample(
            id=f"{job.prompt.id}/{job.turn}",
            tokens=torch.tensor([*row.ids, *row.tokens[:-1]]),
            states=torch.cat(row.states).to("cpu", torch.bfloat16),
            answer_from=len(row.ids) - 1,
        )

    def _next_turn(self, row: Row, job: _Job, waiting: deque[Row], jobs: dict[Row, _Job]) -> None:
        turns = job.prompt.turns
        if job.turn + 1 < min(len(turns), self.max_turns):
            made = row.tokens[:-1] if row.tokens[-1] in self.target.eos_ids else row.tokens
            text = self.target.tokenizer.decode(made, skip_special_tokens=True)
            said = [{"role": "user", "content": turns[job.turn]}, {"role": "assistant", "content": text}]
            self._enqueue(_Job(job.prompt, job.temperature, job.turn + 1, [*job.before, *said]), waiting, jobs)
