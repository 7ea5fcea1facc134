"""Plain decoding, Beagle and transformers' own ``generate`` on the same prompts, interleaved."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch
from transformers import StoppingCriteria, StoppingCriteriaList

from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.evaluation.meta import peak_memory_mb, reset_peak_memory
from beagle.model import Model
from beagle.targets.chat import encode
from beagle.targets.target import Target
from beagle.training.prompts import Prompt

MODES = ("plain", "beagle", "transformers")


@dataclass(frozen=True)
class Options:
    """What every mode is asked to do."""

    max_new_tokens: int = 128
    temperature: float = 0.0
    exact: bool = False
    seed: int = 0


@dataclass
class ModeRun:
    """One mode's answers and figures, question by question."""

    stats: list[Stats] = field(default_factory=list)
    answers: list[list[int]] = field(default_factory=list)
    peak_memory_mb: float = 0.0

    def pooled(self) -> Stats:
        total = Stats()
        for stats in self.stats:
            total.add(stats)
        return total


class _FirstToken(StoppingCriteria):
    """Notes when prefill has ended, which ``generate`` does not tell."""

    def __init__(self) -> None:
        self.at = 0.0

    def __call__(self, input_ids: torch.Tensor, scores: Any, **kwargs: Any) -> Any:
        self.at = self.at or time.perf_counter()
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def answer(model: Model, mode: str, prompt: Prompt, options: Options, stock: Any = None) -> tuple[list[int], Stats]:
    """Token ids and figures of one mode's answer to the first turn of a prompt."""
    if mode == "transformers":
        return transformers_answer(model.target, stock, prompt.turns[0], options)
    result = model.generate(
        prompt.turns[0],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        exact=options.exact,
        draft=mode == "beagle",
    )
    return result.token_ids, result.stats


def transformers_answer(target: Target, stock: Any, text: str, options: Options) -> tuple[list[int], Stats]:
    """The library's own generate on a model of its own: no layer, attention or cache of ours."""
    ids = torch.tensor([encode(target, text)], device=target.device)
    first = _FirstToken()
    sampling: dict[str, Any] = {"do_sample": False}
    if options.temperature:
        torch.manual_seed(options.seed)
        sampling = {"do_sample": True, "temperature": options.temperature, "top_k": 0, "top_p": 1.0}
    began = time.perf_counter()
    out = stock.generate(
        ids,
        attention_mask=torch.ones_like(ids),
        max_new_tokens=options.max_new_tokens,
        stopping_criteria=StoppingCriteriaList([first]),
        **sampling,
    )[0, ids.shape[1] :].tolist()
    ended = time.perf_counter()
    stats = Stats(tokens=len(out), passes=len(out) - 1, passed_tokens=len(out) - 1)
    stats.prefill_seconds = first.at - began
    stats.decode_seconds = ended - first.at
    return out, stats


def run(
    model: Model,
    sets: dict[str, list[Prompt]],
    modes: list[str],
    options: Options,
    progress: Callable[[str], None] = lambda note: None,
    stock: Any = None,
) -> dict[str, dict[str, ModeRun]]:
    """Every mode on every question, in an order that rotates with the question.

    ``stock``: the transformers model that the mode ``transformers`` runs.
    Ctrl-C ends the run early; the questions finished by then are kept.
    """
    for mode in modes:
        if mode not in MODES:
            raise BeagleError(f"mode '{mode}' is unknown; use {', '.join(MODES)}")
    if "beagle" in modes and model.drafter is None:
        raise BeagleError(
            f"no draft head for {model.target.name}; pass --draft FOLDER or leave 'beagle' out of --modes"
        )
    runs = {name: {mode: ModeRun() for mode in modes} for name in sets}
    warm_up = Prompt("warm-up", ("Say hello.",))
    for mode in modes:
        answer(model, mode, warm_up, Options(8, exact=options.exact), stock)
    try:
        for name, prompts in sets.items():
            for i, prompt in enumerate(prompts):
                done: dict[str, tuple[list[int], Stats, float]] = {}
                for j in range(len(modes)):
                    mode = modes[(i + j) % len(modes)]
                    reset_peak_memory()
                    ids, stats = answer(model, mode, prompt, options, stock)
                    done[mode] = (ids, stats, peak_memory_mb())
                for mode, (ids, stats, memory) in done.items():  # whole questions only
                    mode_run = runs[name][mode]
                    mode_run.answers.append(ids)
                    mode_run.stats.append(stats)
                    mode_run.peak_memory_mb = max(mode_run.peak_memory_mb, memory)
                progress(name)
    except KeyboardInterrupt:
        if not any(r.stats for by_mode in runs.values() for r in by_mode.values()):
            raise
    return runs


def merge(runs: dict[str, dict[str, ModeRun]]) -> dict[str, ModeRun]:
    """All sets as one."""
    merged: dict[str, ModeRun] = {}
    for by_mode in runs.values():
        for mode, one in by_mode.items():
            into = merged.setdefault(mode, ModeRun())
            into.stats += one.stats
            into.answers += one.answers
            into.peak_memory_mb = max(into.peak_memory_mb, one.peak_memory_mb)
    return merged


def summary(runs: dict[str, ModeRun]) -> dict[str, Any]:
    """The figures of some runs as JSON: ``modes`` and ``ratios``.

    ``identical``: share of answers equal to plain decoding's, token for token. Ratios are of tokens
    per second, question by question: median, 10th and 90th percentile; ``pooled`` is of the totals.
    """
    modes: dict[str, Any] = {}
    for mode, one in runs.items():
        total = one.pooled()
        figures = total.as_dict()
        modes[mode] = {
            "questions": len(one.stats),
            "tokens": total.tokens,
            "seconds": figures["decode_seconds"],
            "prefill_seconds": figures["prefill_seconds"],
            "tokens_per_second": figures["tokens_per_second"],
            "tau": figures["tau"],
            "step_alpha": figures["step_alpha"],
            "accepted_at_depth": figures["accepted_at_depth"],
            "candidates_per_pass": figures["candidates_per_pass"],
            "draft_seconds": figures["draft_seconds"],
            "verify_seconds": figures["verify_seconds"],
            "identical": identical_share(runs, mode),
            "peak_memory_mb": round(one.peak_memory_mb, 1),
        }
    ratios = {}
    for over, under in (("beagle", "plain"), ("plain", "transformers"), ("beagle", "transformers")):
        if over in runs and under in runs:
            ratios[f"{over}/{under}"] = ratio(runs[over], runs[under])
    return {"modes": modes, "ratios": ratios}


def identical_share(runs: dict[str, ModeRun], mode: str) -> float | None:
    if "plain" not in runs or not runs["plain"].answers:
        return None
    pairs = list(zip(runs[mode].answers, runs["plain"].answers, strict=True))
    return round(sum(a == b for a, b in pairs) / len(pairs), 4)


def ratio(over: ModeRun, under: ModeRun) -> dict[str, float]:
    each = [
        a.tokens_per_second / b.tokens_per_second
        for a, b in zip(over.stats, under.stats, strict=True)
        if a.tokens_per_second and b.tokens_per_second
    ]
    if not each:
        return {}
    cuts = quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
    pooled = over.pooled().tokens_per_second / under.pooled().tokens_per_second
    values = {"median": median(each), "low": cuts[0], "high": cuts[-1], "pooled": pooled}
    return {name: round(value, 4) for name, value in values.items()}


@torch.no_grad()
def first_differences(model: Model, prompts: list[Prompt], runs: dict[str, ModeRun], mode: str) -> list[dict[str, Any]]:
    """Where answers of ``mode`` leave plain decoding's, and how near to a tie the target was there.

    ``gap``: logit of plain's token minus that of the other, recomputed in one pass over the context
    (so in one more kernel shape: it can be slightly negative).
    """
    target = model.target
    out = []
    for prompt, ours, plain in zip(prompts, runs[mode].answers, runs["plain"].answers, strict=False):
        if ours == plain:
            continue
        at = next((i for i, (a, b) in enumerate(zip(ours, plain, strict=False)) if a != b), None)
        if at is None:
            out.append({"id": prompt.id, "position": min(len(ours), len(plain)), "gap": None})
            continue
        ids = encode(target, prompt.turns[0]) + plain[:at]
        states = target.prefill(torch.tensor([ids], device=target.device), target.new_cache(1, len(ids)))
        logits = target.logits(states[0, -1]).float()
        gap = float(logits[plain[at]] - logits[ours[at]])
        out.append({"id": prompt.id, "position": at, "gap": round(gap, 4)})
    return out
