"""From single answers to figures: speed, speed-up with its spread, τ, acceptance, equality, memory."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from statistics import median, quantiles
from typing import Any

from beagle.decoding.costs import Costs
from beagle.decoding.stats import pooled
from beagle.evaluation.first_divergence import is_near_tie
from beagle.evaluation.records import Record


def figures(
    records: Sequence[Record],
    costs: Mapping[str, Costs] | None = None,
    weights: Mapping[str, float] | None = None,
    *,
    greedy: bool = True,
) -> dict[str, Any]:
    """All figures of a run: ``modes`` and ``ratios`` of everything, the same by set, and first differences.

    Args:
        costs: measured costs by mode, for the expected speed-ups.
        weights: megabytes of each mode besides the target.
        greedy: whether answers were compared with plain decoding's (sampled ones aren't: see ``run``).
    """
    result = summary(records, costs, weights)
    sets = by(records, "set")
    result["sets"] = {name: summary(part, costs, weights) for name, part in sets.items()}
    for name, part in sets.items():
        categories = by(part, "category")
        if len(categories) > 1:
            result["sets"][name]["categories"] = {c: summary(found, costs, weights) for c, found in categories.items()}
    if "plain" in result["modes"] and greedy:
        result["first_differences"] = {
            mode: {
                name: [{"id": r.id, **r.difference} for r in part if r.mode == mode and r.difference and not r.repeat]
                for name, part in sets.items()
            }
            for mode in result["modes"]
            if mode != "plain"
        }
    return result


def by(records: Iterable[Record], key: str) -> dict[str, list[Record]]:
    """Records by one of their fields, in order of appearance."""
    parts: dict[str, list[Record]] = {}
    for record in records:
        parts.setdefault(getattr(record, key), []).append(record)
    return parts


def question_key(record: Record) -> tuple[str, str, int]:
    return record.set, record.id, record.repeat


def summary(
    records: Sequence[Record], costs: Mapping[str, Costs] | None = None, weights: Mapping[str, float] | None = None
) -> dict[str, Any]:
    """The figures of some records as JSON: ``modes`` and ``ratios``.

    Counts and times are pooled over all turns, questions and repeats; a speed takes each question at its
    median over the repeats. ``identical``: share of answers equal to plain decoding's, token for token, in
    all turns; ``near_ties``: share of those that leave it where the target was near a tie.
    """
    modes = by(records, "mode")
    found = {mode: _mode(part, modes.get("plain")) for mode, part in modes.items()}
    ratios = {}
    pairs = [("beagle", "plain"), ("plain", "transformers"), ("beagle", "transformers")]
    pairs += [(mode, "plain") for mode in modes if mode not in ("plain", "beagle", "transformers")]
    for over, under in pairs:
        if over in modes and under in modes:
            ratios[f"{over}/{under}"] = ratio(modes[over], modes[under])
    for mode, cost in (costs or {}).items():
        if mode in found:
            candidates = found[mode]["candidates_per_pass"]
            found[mode]["expected_speed_up"] = round(expected(found[mode]["tau"], candidates, cost), 4)
    for mode, weight in (weights or {}).items():
        if mode in found:
            growth = max(r.growth_mb for r in modes[mode])
            found[mode]["memory_above_target_mb"] = round(weight + growth, 1)
    return {"modes": found, "ratios": ratios}


def _mode(records: Sequence[Record], plain: Sequence[Record] | None) -> dict[str, Any]:
    total = pooled(record.stats for record in records)
    every = total.as_dict()
    count = len(records)
    same = None
    if plain:
        reference = {question_key(r): r.answers for r in plain}
        same = round(sum(r.answers == reference[question_key(r)] for r in records) / count, 4)
    return {
        "questions": len({(r.set, r.id) for r in records}),
        "tokens": total.tokens,
        "seconds": every["decode_seconds"],
        "prefill_seconds": every["prefill_seconds"],
        "tokens_per_second": round(speed(records), 3),
        **{name: every[name] for name in ("tau", "step_alpha", "accepted_at_depth", "candidates_per_pass")},
        "passes": total.passes,
        **{name: every[name] for name in ("draft_seconds", "verify_seconds", "accept_seconds", "other_seconds")},
        "identical": same,
        "near_ties": round(sum(is_near_tie(r.difference) for r in records) / count, 4) if plain else None,
        "peak_memory_mb": max(r.peak_memory_mb for r in records),
    }


def speed(records: Sequence[Record]) -> float:
    """Tokens per second after prefill, pooled over questions, each at its median over the repeats."""
    tokens, seconds = 0, 0.0
    questions: dict[tuple[str, str], list[Record]] = {}
    for record in records:
        questions.setdefault((record.set, record.id), []).append(record)
    for repeats in questions.values():
        typical = median(r.stats.tokens_per_second for r in repeats)
        made = sum(r.stats.passed_tokens for r in repeats)
        if typical:
            tokens += made
            seconds += made / typical
    return tokens / seconds if seconds else 0.0


def ratio(over: Sequence[Record], under: Sequence[Record]) -> dict[str, Any]:
    """Speed of one mode over that of another.

    Returns:
        ``pooled`` (quotient of the two speeds), and over the pairs of the same question and repeat ``median``,
        ``low`` and ``high`` (10th and 90th percentile: the spread) and ``count``. Empty where nothing was timed.
    """
    slow = {question_key(r): r.stats.tokens_per_second for r in under}
    each = [
        r.stats.tokens_per_second / slow[question_key(r)]
        for r in over
        if r.stats.tokens_per_second and slow.get(question_key(r))
    ]
    if not each:
        return {}
    cuts = quantiles(each, n=10, method="inclusive") if len(each) > 1 else each * 9
    values = {"median": median(each), "low": cuts[0], "high": cuts[-1], "pooled": speed(over) / speed(under)}
    return {name: round(value, 4) for name, value in values.items()} | {"count": len(each)}


def resolved(values: Mapping[str, Any]) -> bool:
    """Whether a speed-up is one: its spread lies wholly on one side of 1, and so does the pooled ratio."""
    if not values or values.get("count", 2) < 2:  # older files don't count
        return False
    return min(values["low"], values["pooled"]) > 1 or max(values["high"], values["pooled"]) < 1


def speed_up_text(values: Mapping[str, Any]) -> str:
    """A ratio for readers; no plain number where its spread is wider than its effect."""
    if not values:
        return "-"
    if values.get("count", 2) < 2:
        return f"not resolved: one measurement, {values['pooled']:.2f}"
    spread = f"{values['low']:.2f} to {values['high']:.2f}"
    return f"{values['pooled']:.2f}× ({spread})" if resolved(values) else f"not resolved: {spread}"


def expected(tau: float, candidates: float, costs: Costs) -> float:
    """Speed-up by the cost model: E[τ] / (T_draft + T_verify(n)) against plain decoding's 1 / T_verify(1)."""
    tokens = min(1 + round(candidates), len(costs.verify) - 1)
    return tau * costs.verify[1] / (costs.draft + costs.verify[tokens])
