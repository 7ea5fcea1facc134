"""transformers' own ``generate``, plain and drafting, on models of its own."""

from __future__ import annotations

import time
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from beagle.decoding.sampling_params import SamplingParams
from beagle.decoding.stats import Stats

HF_MODES = ("transformers", "prompt-lookup", "assisted")
PROMPT_LOOKUP_TOKENS = 10  # candidates a pass: what transformers' own lookup generator defaults to


@dataclass(frozen=True)
class HFGenerate:
    """transformers models as they are, with no layer, attention or cache of ours."""

    model: Any
    assistant: Any = None

    def answer(self, mode: str, ids: list[int], sampling: SamplingParams) -> tuple[list[int], Stats]:
        """Token ids and figures of ``generate`` in one of ``HF_MODES``.

        Its drafting modes verify their first candidates in the pass that runs the prompt, so that
        pass and its tokens count as prefill. How many candidates it verified it doesn't tell: 0 here.
        """
        prompt = torch.tensor([ids], device=self.model.device)
        options: dict[str, Any] = {"do_sample": False}
        if sampling.temperature:
            torch.manual_seed(sampling.seed)
            options = {"do_sample": True, "temperature": sampling.temperature, "top_k": 0, "top_p": 1.0}
        if mode == "prompt-lookup":
            options["prompt_lookup_num_tokens"] = PROMPT_LOOKUP_TOKENS
        elif mode == "assisted":
            options["assistant_model"] = self.assistant
        passes = _Passes()
        hook = self.model.register_forward_hook(passes.note)
        began = time.perf_counter()
        try:
            out = self.model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=sampling.max_new_tokens,
                stopping_criteria=StoppingCriteriaList([passes]),
                **options,
            )[0, len(ids) :].tolist()
        finally:
            hook.remove()
        ended = time.perf_counter()
        # on a GPU its check for the end lags behind, and surplus steps are taken back
        lengths = [n for n in passes.lengths if n <= len(ids) + len(out)]
        made = [after - before for before, after in pairwise(lengths)]
        stats = Stats(tokens=len(out), passed_tokens=sum(made))
        for n in made:
            stats.note_pass(n - 1)
        stats.prefill_seconds = passes.first_ended - began
        stats.decode_seconds = ended - passes.first_ended
        return out, stats


class _Passes(StoppingCriteria):
    """Notes when prefill has ended and how long the sequence is after each pass: ``generate`` tells neither.

    What drafts may ask the criteria too (transformers 5.17), so only the first call after a pass counts.
    """

    def __init__(self) -> None:
        self.first_ended = 0.0
        self.lengths: list[int] = []
        self._ran = False

    def note(self, *args: Any) -> None:
        """The model has run a pass."""
        self._ran = True

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        if self._ran:
            self.first_ended = self.first_ended or time.perf_counter()
            self.lengths.append(input_ids.shape[1])
            self._ran = False
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)
