"""The target answers many prompts at once, and its true states are kept as they come by.

Rows of a fixed batch are refilled as answers end, so long answers don't hold up short ones.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field

import torch
from torch import Tensor

from beagle.targets.cache import KVCache
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


@dataclass
class _Job:
    prompt: Prompt
    temperature: float
    turn: int = 0
    history: list[Message] = field(default_factory=list)
    ids: list[int] = field(default_factory=list)
    answer: list[int] = field(default_factory=list)


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
        self.random = torch.Generator(device=target.device).manual_seed(seed)

    def run(self, prompts: Iterable[Prompt]) -> Iterator[Sample]:
        """Answer every prompt, each turn a sample; prompts that are too long are passed over."""
        target = self.target
        capacity = self.max_prompt_tokens + self.max_new_tokens + 1
        cache = target.new_cache(self.rows, capacity)
        cache.lengths = [0] * self.rows
        states = torch.zeros(self.rows, capacity, target.hidden_size, dtype=target.dtype, device=target.device)
        busy: dict[int, _Job] = {}
        pending = torch.zeros(self.rows, dtype=torch.long, device=target.device)
        source = iter(prompts)
        queue: deque[_Job] = deque()
        exhausted = False
        while True:
            free = [row for row in range(self.rows) if row not in busy]
            if len(free) >= max(1, self.rows // 8):
                while not exhausted and len(queue) < 4 * self.rows:
                    prompt = next(source, None)
                    if prompt is None:
                        exhausted = True
                        break
                    sampled = float(torch.rand((), generator=self.random, device=target.device)) < self.sampled_share
                    self._enqueue(queue, _Job(prompt, self.temperature if sampled else 0.0))
                self._fill(free, queue, busy, cache, states, pending)
            if not busy:
                if exhausted and not queue:
                    return
                continue
            lengths = list(cache.lengths)
            new = target.step(pending, cache)
            tokens = self._choose(new, busy)
            for row in range(self.rows):
                if row not in busy:
                    cache.lengths[row] = 0
            for row, job in list(busy.items()):
                states[row, lengths[row]] = new[row]
                if self._accept(row, int(tokens[row]), job, pending):
                    del busy[row]
                    yield self._finish(row, job, cache.lengths[row], states, queue)
                    cache.lengths[row] = 0

    def _enqueue(self, queue: deque[_Job], job: _Job) -> None:
        job.history.append({"role": "user", "content": job.prompt.turns[job.turn]})
        job.ids = encode(self.target, job.history)
        if len(job.ids) <= self.max_prompt_tokens:
            queue.append(job)

    def _fill(
        self,
        free: list[int],
        queue: deque[_Job],
        busy: dict[int, _Job],
        cache: KVCache,
        states: Tensor,
        pending: Tensor,
    ) -> None:
        """Prefill waiting prompts of similar length together and give each a row."""
        target = self.target
        while free and queue:
            jobs = sorted((queue.popleft() for _ in range(min(len(free), len(queue)))), key=lambda j: len(j.ids))
            for start in range(0, len(jobs), 8):
                group = jobs[start : start + 8]
                lengths = [len(job.ids) for job in group]
                ids = torch.zeros(len(group), max(lengths), dtype=torch.long)
                for i, job in enumerate(group):
                    ids[i, : lengths[i]] = torch.tensor(job.ids)
                scratch = target.new_cache(len(group), max(lengths))
                out = target.prefill(ids.to(target.device), scratch, lengths)
                last = out[torch.arange(len(group)), torch.tensor(lengths) - 1]
                rows = [free.pop() for _ in group]
                for i, (row, job) in enumerate(zip(rows, group, strict=True)):
                    cache.copy_row(row, scratch, i)
                    states[row, : lengths[i]] = out[i, : lengths[i]]
                    busy[row] = job
                tokens = self._choose(last, dict(enumerate(group)))
                for i, (row, job) in enumerate(zip(rows, group, strict=True)):
                    if self._accept(row, int(tokens[i]), job, pending):
                        del busy[row]  # an empty answer teaches nothing
                        cache.lengths[row] = 0

    def _choose(self, states: Tensor, jobs: dict[int, _Job]) -> Tensor:
        logits = self.target.logits(states).float()
        tokens = logits.argmax(-1)
        warm = [row for row, job in jobs.items() if job.temperature > 0]
        if warm:
            temperature = torch.tensor([[jobs[row].temperature] for row in warm], device=logits.device)
            chances = torch.softmax(logits[warm] / temperature, dim=-1)
            tokens[warm] = torch.multinomial(chances, 1, generator=self.random)[:, 0]
        return tokens.cpu()

    def _accept(self, row: int, token: int, job: _Job, pending: Tensor) -> bool:
        """Note the next token; true if the answer ends with it."""
        if token in self.target.eos_ids:
            return True
        job.answer.append(token)
        pending[row] = token
        return len(job.answer) > self.max_new_tokens

    def _finish(self, row: int, job: _Job, length: int, states: Tensor, queue: deque[_Job]) -> Sample:
        answer = job.answer
        sample = Sample(
            id=f"{job.prompt.id}/{job.turn}",
            tokens=torch.tensor((job.ids + answer)[:length]),
            states=states[row, :length].to("cpu", torch.bfloat16, copy=True),
            answer_from=len(job.ids) - 1,
        )
        if job.turn + 1 < min(len(job.prompt.turns), self.max_turns):
            text = self.target.tokenizer.decode(answer, skip_special_tokens=True)
            history = [*job.history, {"role": "assistant", "content": text}]
            self._enqueue(queue, _Job(job.prompt, job.temperature, job.turn + 1, history))
        return sample
