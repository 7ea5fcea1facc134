"""Plain decoding, Beagle and its rivals, transformers' own ``generate`` among them, on the same prompts, interleaved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from statistics import median, quantiles
from typing import Any

import torch

from beagle.decoding.stats import Stats
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import load_small, refuse_other_vocabulary
from beagle.errors import BeagleError
from beagle.evaluation.meta import peak_memory_mb, reset_peak_memory
from beagle.evaluation.stock import STOCK_MODES, Stock
from beagle.model import Model
from beagle.targets.chat import encode
from beagle.targets.loading import load_model
from beagle.training.prompts import Prompt

OUR_MODES = ("plain", "beagle", "lookup", "small")  # no drafts, --draft, prompt lookup, a small model
MODES = (*OUR_MODES, *STOCK_MODES)
NEED_SMALL = ("small", "assisted")


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


@dataclass(frozen=True)
class Rivals:
    """What the modes besides ``plain`` and ``beagle`` run on.

    Attributes:
        models: ``lookup`` and ``small``: drafters of their own on the one target that all of ours share.
        stock: what transformers' own modes run on, where there are any.
    """

    models: Mapping[str, Model] = field(default_factory=dict)
    stock: Stock | None = None


def check_modes(modes: list[str], small_model: str | None) -> None:
    """
    Raises:
        BeagleError: a mode is unknown, or needs a small model and there is none.
    """
    for mode in modes:
        if mode not in MODES:
            raise BeagleError(f"mode '{mode}' is unknown; use {', '.join(MODES)}")
        if mode in NEED_SMALL and small_model is None:
            raise BeagleError(f"mode '{mode}' drafts with a small model; name it with --small-model")


def load_rivals(model: Model, modes: list[str], target: str, small_model: str | None, **options: Any) -> Rivals:
    """Load what ``modes`` need besides ``model``; names and options as of ``targets.loading.load_model``.

    Raises:
        BeagleError: something can't be loaded, or the small model has another vocabulary.
    """
    check_modes(modes, small_model)
    models: dict[str, Model] = {}
    if "lookup" in modes:
        models["lookup"] = Model(model.target, LookupDrafter(), model.plan)
    if "small" in modes:
        models["small"] = Model(model.target, load_small(str(small_model), model.target, **options), model.plan)
    if not any(mode in STOCK_MODES for mode in modes):
        return Rivals(models)
    assistant = None
    if "assisted" in modes:
        assistant, tokenizer = load_model(str(small_model), **options)
        refuse_other_vocabulary(model.target, tokenizer, str(small_model))
    return Rivals(models, Stock(load_model(target, **options)[0], assistant))


def answer(
    model: Model, mode: str, prompt: Prompt, options: Options, rivals: Rivals | None = None
) -> tuple[list[int], Stats]:
    """Token ids and figures of one mode's answer to the first turn of a prompt."""
    if mode in STOCK_MODES:
        assert rivals is not None
        assert rivals.stock is not None
        return rivals.stock.answer(
            mode,
            encode(model.target, prompt.turns[0]),
            max_new_tokens=options.max_new_tokens,
            temperature=options.temperature,
            seed=options.seed,
        )
    if mode not in ("plain", "beagle"):
        assert rivals is not None
        model = rivals.models[mode]
    result = model.generate(
        prompt.turns[0],
        max_new_tokens=options.max_new_tokens,
        temperature=options.temperature,
        seed=options.seed,
        exact=options.exact,
        draft=mode != "plain",
    )
    return result.token_ids, result.stats


def run(
    model: Model,
    sets: dict[str, list[Prompt]],
    modes: list[str],
    options: Options,
    progress: Callable[[str], None] = lambda note: None,
    rivals: Rivals | None = None,
) -> dict[str, dict[str, ModeRun]]:
    """Every mode on every question, in an order that rotates with the question.

    ``rivals``: what ``load_rivals`` loaded for these modes.
    Ctrl-C ends the run early; the questions finished by then are kept.
    """
    check_modes(modes, small_model="")
    if "beagle" in modes and model.drafter is None:
        raise BeagleError(
            f"no draft head for {model.target.name}; pass --draft FOLDER or leave 'beagle' out of --modes"
        )
    runs = {name: {mode: ModeRun() for mode in modes} for name in sets}
    warm_up = Prompt("warm-up", ("Say hello.",))
    for mode in modes:
        answer(model, mode, warm_up, Options(8, exact=options.exact), rivals)
    try:
        for name, prompts in sets.items():
            for i, prompt in enumerate(prompts):
                done: dict[str, tuple[list[int], Stats, float]] = {}
                for j in range(len(modes)):
                    mode = modes[(i + j) % len(modes)]
                    reset_peak_memory()
                    ids, stats = answer(model, mode, prompt, options, rivals)
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
    pairs = [("beagle", "plain"), ("plain", "transformers"), ("beagle", "transformers")]
    pairs += [(mode, "plain") for mode in ("lookup", "small", "prompt-lookup", "assisted")]
    for over, under in pairs:
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
