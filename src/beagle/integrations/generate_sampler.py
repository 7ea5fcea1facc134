"""The sampler of one prompt of a ``generate`` call: tokens are chosen, and the answer ended, by transformers' own parts."""

from __future__ import annotations

import copy
from typing import Any, cast

import torch
from torch import LongTensor, Tensor
from transformers import GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from beagle.decoding.sampling import Sampler


class GenerateSampler(Sampler):
    """Sees each position once and in order, as transformers' own loop does.

    A token of the answer is chosen at one node of one tree (see ``decoding.walk.accept``), so logits
    processors, torch's generator, stopping criteria and streamers meet what they would meet without drafts:
    whatever they remember stays right.
    """

    def __init__(
        self,
        prompt: Tensor,
        config: GenerationConfig,
        processors: LogitsProcessorList,
        criteria: StoppingCriteriaList,
        streamer: Any = None,
        name: str = "the target",
    ) -> None:
        """
        Args:
            prompt: ``[n]``, with its padding: what processors and criteria are shown.
        """
        kept = bool(config.return_dict_in_generate)
        self.scores: tuple[Tensor, ...] | None = () if kept and config.output_scores else None
        self.logits: tuple[Tensor, ...] | None = () if kept and config.output_logits else None
        self._sample = bool(config.do_sample)
        super().__init__(name=name)
        self.greedy = not processors and not self._sample and self.scores is None and self.logits is None
        self._ids = cast(LongTensor, prompt[None])
        self._logits_processors, self._criteria, self._streamer = processors, criteria, streamer

    @property
    def ids(self) -> Tensor:
        """Prompt and answer so far, ``[tokens]``."""
        return self._ids[0]

    def choose(self, logits: Tensor, position: int) -> int:
        """The token after ``ids``, from the target's logits ``[vocabulary]``."""
        if self.greedy:
            return super().choose(logits, position)
        raw = logits[None].to(self._ids.device, torch.float32, copy=True)
        scores = self._logits_processors(self._ids, raw)
        largest, token = scores[0].max(-1)
        self.check(float(largest))
        if self.scores is not None:
            self.scores += (scores,)
        if self.logits is not None:
            self.logits += (raw,)
        if self._sample:
            return int(torch.multinomial(torch.softmax(scores, dim=-1), num_samples=1))
        return int(token)

    def ended(self, token: int) -> bool:
        """Take the chosen token; whether the answer ends with it."""
        self._ids = cast(LongTensor, torch.cat([self._ids, self._ids.new_tensor([[token]])], dim=1))
        over = bool(self._criteria(self._ids, self.scores))
        if self._streamer is not None:
            self._streamer.put(torch.tensor([token]))
        return over


def processors_of(processors: LogitsProcessorList, i: int) -> LogitsProcessorList:
    """The processors of a batch for prompt ``i`` of it: one of transformers' own knows each prompt's padding."""
    mine = LogitsProcessorList()
    for processor in processors:
        padding = getattr(processor, "prompt_ignore_length", None)
        if isinstance(padding, Tensor):
            processor = copy.copy(processor)
            processor.prompt_ignore_length = padding[i : i + 1]
        mine.append(processor)
    return mine
