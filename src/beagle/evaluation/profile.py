"""Where the time of decoding goes, and how far a pass is from what the machine allows."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch

from beagle.decoding.costs import one_tree, timed_sizes
from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.drafters.lookup import LookupDrafter
from beagle.evaluation.best_rates import best_rates
from beagle.evaluation.breakdown import breakdown
from beagle.evaluation.figures import figures
from beagle.evaluation.modes import Options, System
from beagle.evaluation.records import Record
from beagle.evaluation.roofline import Machine, Work, measure, roofline
from beagle.evaluation.run import Sets, run
from beagle.memory import finish_huge_pages
from beagle.model import Model
from beagle.targets.chat import Message
from beagle.targets.target import Target

CONTEXT = 256  # tokens before the passes that are timed by their tokens


@dataclass(frozen=True)
class Timed(System):
    """A mode that also notes each answer's time outside the engine: tokenising, putting text together."""

    texts: list[float] = field(default_factory=list)

    def answer(self, prompt: str | Sequence[Message], options: Options, seed: int) -> tuple[list[int], Stats]:
        began = time.perf_counter()
        ids, stats = super().answer(prompt, options, seed)
        self.texts.append(time.perf_counter() - began - stats.prefill_seconds - stats.decode_seconds)
        return ids, stats


class Profile:
    """Plain decoding and, where there is a drafter, drafting, side by side on the same questions."""

    def __init__(self, model: Model, options: Options) -> None:
        """Measures the machine and the costs of a pass anew: old ones may come from a busier hour."""
        self.model = model
        self.options = options
        finish_huge_pages()
        self._work = passes(model.target, options.exact)
        self.now, self.passes = measure(model.target, self._work)
        self.machine = self.now
        # a pass costs the same whatever drafts; decoding plainly, the cheapest drafter stands in
        timed = model if model.drafter is not None else Model(model.target, LookupDrafter(), TreePlan())
        self.costs = timed.costs(options.exact, fresh=True)
        self.modes = [Timed("plain", Model(model.target))]
        if model.drafter is not None:
            self.modes.append(Timed("beagle", model))

    def run(self, sets: Sets) -> Iterator[list[Record]]:
        """The records of each question as soon as it is answered."""
        yield from run(self.modes, sets, self.options)

    def measure_again(self) -> None:
        """Measure the machine and passes once more, some time after the first: the best of both times counts.

        Rooflines are those of the best rates that the machine has shown so far.
        """
        machine, seconds = measure(self.model.target, self._work)
        self.now = self.now.best(machine)
        self.machine = best_rates(self.now, self.model.target)
        self.passes = {tokens: min(seconds[tokens], before) for tokens, before in self.passes.items()}

    def result(self, records: Sequence[Record]) -> dict[str, Any]:
        """A side-by-side run's figures, and ``rates`` (the best known; this run's are ``rates_now``), ``passes`` (by tokens),
        ``parts`` of native ones and, drafting, ``model`` and ``draft_ms``."""
        costs = {"beagle": self.costs} if self.model.drafter is not None else {}
        result = figures(records, costs)
        for mode in self.modes:
            m = result["modes"][mode.mode]
            m["text_seconds"] = round(sum(mode.texts[1:]), 4)  # the first is the warm-up
            m["outside_share"] = round((m["accept_seconds"] + m["other_seconds"]) / m["seconds"], 4)
        if costs:
            result["draft_ms"] = round(1000 * self.costs.draft, 3)
            result["model"] = against_model(result)
        result["rates"], result["rates_now"] = asdict(self.machine), asdict(self.now)
        result["passes"] = against_roofline(self.model.target, self.machine, self.passes)
        result["parts"] = breakdown(self.model.target, timed_sizes(self.model.target, CONTEXT)[0])
        return result


def passes(target: Target, exact: bool) -> dict[int, Work]:
    """What is timed, by its number of tokens."""
    context, sizes, keys = timed_sizes(target, CONTEXT, exact)
    cache = target.new_cache(1, keys)
    target.prefill(torch.ones(1, context, dtype=torch.long, device=target.device), cache)
    return {n: one_tree(target, cache, n, keys if exact else None) for n in sizes}


def against_roofline(target: Target, machine: Machine, seconds: Mapping[int, float]) -> list[dict[str, float]]:
    """An entry for each timed number of tokens: milliseconds of a pass, its roofline, and what bounds that."""
    context, *_ = timed_sizes(target, CONTEXT)
    out = []
    for tokens, measured in seconds.items():
        least = roofline(target, machine, tokens, context)
        out.append(
            {
                "rows": tokens,
                "ms": round(1000 * measured, 3),
                "floor_ms": round(1000 * least.seconds, 4),
                "read_ms": round(1000 * least.bytes / machine.bandwidth, 4),
                "compute_ms": round(1000 * least.operations / machine.matrix_rate, 4),
                "megabytes": round(least.bytes / 1e6, 2),
                "gigaoperations": round(least.operations / 1e9, 4),
            }
        )
    return out


def against_model(result: Mapping[str, Any]) -> dict[str, float]:
    """The cost model's speed-up beside the one achieved, and what share of it that is."""
    expected = result["modes"]["beagle"]["expected_speed_up"]
    achieved = result["ratios"]["beagle/plain"].get("pooled", 0.0)
    return {"expected_speed_up": expected, "achieved_speed_up": achieved, "share": round(achieved / expected, 4)}
