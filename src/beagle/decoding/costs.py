"""What a pass costs on this machine, measured once, and the tree size that follows from it.

A tree of n candidates is worth (1 + Σ_{i<=n} P_i) / T_verify(n), where P_i, the cumulative draft probability of
candidate i, estimates the probability of its acceptance (EAGLE-2). Of a single answer, T_draft is added to T_verify(n).
"""

from __future__ import annotations

import math
import platform
import time
from collections.abc import Callable
from dataclasses import dataclass, fields
from statistics import median
from typing import Any

import torch

from beagle.drafters.base import Draft, Drafter, TreePlan
from beagle.files import kept_entries, write_json
from beagle.limits import MAX_NODES
from beagle.memory import finish_huge_pages
from beagle.targets.cache import KVCache
from beagle.targets.linears import tiled
from beagle.targets.loading import cache_dir
from beagle.targets.plan import EXACT_BLOCK, EXACT_TOKENS
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target

SEVERAL = 4  # contexts that draft at once or share a pass while that is timed
AGAIN = 4  # tokens that recurrent layers run again in passes that are timed
SIZES = (1, 2, 4, 6, 8, 12, 16, 24, 32, 48, MAX_NODES)
STEADY = 1.3  # on a machine with nothing else to do, the median of a time is no longer than so many of its least ones
CHECKS = 5  # passes that known costs are compared with
TRIES = 3  # measurements on a machine that is busy


@dataclass(frozen=True)
class Costs:
    """Seconds on this machine.

    Attributes:
        verify: of a pass, by its tokens: up to ``MAX_NODES``, in exact mode ``EXACT_TOKENS``. Those of a batch belong to
            up to ``SEVERAL`` contexts.
        draft: of a whole draft.
        depth: levels of that draft.
        seconds_per_extra_context: what each further context adds to it that drafts beside the first.
        steady: the machine had nothing else to do.
    """

    verify: list[float]
    draft: float
    depth: int
    seconds_per_extra_context: float = 0.0
    steady: bool = True

    def drafting(self, contexts: int) -> float:
        """Seconds of a draft of so many contexts at once."""
        return self.draft + (contexts - 1) * self.seconds_per_extra_context

    def best_tree_size(self, scores: list[float], roots: int = 1) -> int:
        """Candidates worth verifying, given their cumulative log-probabilities, best first.

        Args:
            roots: answers that share the pass, and their candidates its cost: each brings its root.
        """
        best, expected = 0, float(roots)
        spent = self.draft if roots == 1 else 0.0  # so that one noisy pass doesn't end drafting; among many it costs
        best_rate = expected / (self._pass(roots) + spent)
        for n, score in enumerate(scores[: roots * (len(self.verify) - 2)], 1):
            expected += math.exp(score)
            rate = expected / (self._pass(roots + n) + spent)
            if rate > best_rate:
                best, best_rate = n, rate
        return best

    def share(self, drafts: list[Draft], roots: int) -> list[Draft]:
        """The candidates of several drafts that are worth their share of one pass, the likeliest first.

        Args:
            drafts: best first, so that what is kept of each is a prefix, which is a tree.
            roots: sequences of the pass, those without a draft included.
        """
        ranked = sorted((-score, i) for i, draft in enumerate(drafts) for score in draft.scores)
        counts = [0] * len(drafts)
        for _, i in ranked[: self.best_tree_size([-score for score, _ in ranked], roots)]:
            counts[i] += 1
        return [draft.first(n) for draft, n in zip(drafts, counts, strict=True)]

    def _pass(self, tokens: int) -> float:
        """``verify``, going on as steeply as its second half where a pass has more tokens than were measured."""
        last = len(self.verify) - 1
        if tokens <= last:
            return self.verify[tokens]
        return self.verify[last] + (tokens - last) * (self.verify[last] - self.verify[last // 2]) / (last - last // 2)

    def min_expected_tokens(self, contexts: int = 1) -> float:
        """Probability that some node of the beam is right, below which another level isn't worth its time.

        A level costs its own time, a share of it where several contexts draft at once, and that of a token to verify;
        at the speed of plain decoding that is so many tokens. Where the beam is right, the level is about half
        the time. Above 1 not even the first level is worth it, whose beam is the root.
        """
        plain = self._pass(contexts)
        token = (self._pass(contexts + 7) - plain) / 7
        return 2 * (self.drafting(contexts) / contexts / self.depth + token) / (plain / contexts)


def interpolate(points: dict[int, float]) -> list[float]:
    """Times of passes of 0 … max tokens from measured ones, made non-decreasing."""
    sizes = sorted(points)
    out = [points[sizes[0]]]
    for n in range(1, sizes[-1] + 1):
        high = next(s for s in sizes if s >= n)
        low = max((s for s in sizes if s <= n), default=high)
        share = 0.0 if high == low else (n - low) / (high - low)
        out.append(max(out[-1], points[low] + share * (points[high] - points[low])))
    return out


def tree_sizes(nodes: int, trees: int) -> list[int]:
    """So many nodes over at most so many trees, evenly."""
    trees = min(nodes, trees)
    return [nodes // trees + (i < nodes % trees) for i in range(trees)]


def measure(
    target: Target,
    drafter: Drafter,
    plan: TreePlan,
    exact: bool = False,
    batch: bool = False,
    context: int = 256,
    repeats: int = 7,
) -> Costs:
    """Time verification by size, and drafting for one context and for several, interleaved, medians.

    Chains of a target with a recurrent state are timed behind a rejected draft, of which some tokens run again.
    """
    finish_huge_pages()
    context, sizes, keys = timed_sizes(target, context, exact)
    ids = [1 + i % (target.vocab_size - 1) for i in range(context)]
    cache = target.new_cache(1, keys)
    states = target.prefill(torch.tensor([ids], device=target.device), cache)[0]
    drafted = _after_rejection(target, ids, keys) if target.chains_only else cache
    if batch:
        cache, drafted = (_several(target, one, keys) for one in (cache, drafted))
    alone, *several = contexts = [drafter.context() for _ in range(1 + SEVERAL)]
    for own in contexts:
        own.extend(ids, states)
    passes = {
        n: several_trees(target, drafted if n > 1 else cache, tree_sizes(n, SEVERAL))
        if batch
        else one_tree(target, drafted if n > 1 else cache, n, keys if exact else None)
        for n in sizes
    }
    times: dict[int, list[float]] = {n: [] for n in sizes}
    drafts: list[float] = []
    drafts_of_several: list[float] = []
    for _ in range(repeats):
        for n in sizes:
            began = time.perf_counter()
            passes[n]()
            times[n].append(time.perf_counter() - began)
        for own in contexts:
            own.extend(ids[-1:], states[-1:])  # a draft begins with what the last pass brought
        began = time.perf_counter()
        drafter.draft([alone], ids[:1], plan)
        drafts.append(time.perf_counter() - began)
        began = time.perf_counter()
        drafter.draft(several, [ids[0]] * SEVERAL, plan)
        drafts_of_several.append(time.perf_counter() - began)
    one = median(drafts)
    more = max(0.0, median(drafts_of_several) - one) / (SEVERAL - 1)
    spreads = [median(t) / min(t) for t in (*times.values(), drafts)]
    verify = interpolate({n: median(t) for n, t in times.items()})
    return Costs(verify, one, plan.depth, more, steady=median(spreads) <= STEADY)


def timed_sizes(target: Target, context: int, exact: bool = False) -> tuple[int, list[int], int]:
    """Of passes that are timed: tokens before them, as many as asked for if they fit, their own numbers of tokens, and the
    keys of them all, in whole blocks of exact mode."""
    context = max(1, min(context, target.context_limit - SIZES[-1] - 1))
    sizes = [n for n in SIZES if context + n <= target.context_limit and (not exact or n <= EXACT_TOKENS)]
    return context, sizes, -(-(context + sizes[-1]) // EXACT_BLOCK) * EXACT_BLOCK


def still_true(costs: Costs, target: Target) -> bool:
    """Whether passes of one token take about as long as they did: they may have been measured on a busy machine."""
    work = one_tree(target, target.new_cache(1, 8), 1)
    times = []
    for _ in range(CHECKS):
        began = time.perf_counter()
        work()
        times.append(time.perf_counter() - began)
    return min(times) > costs.verify[1] / 2


def one_tree(target: Target, cache: KVCache, nodes: int, exact_keys: int | None = None) -> Callable[[], list[int]]:
    """A pass of so many tokens as far as the likeliest next ones.

    Args:
        exact_keys: padded number of keys, in exact mode.
    """
    tokens, shape = torch.ones(nodes, dtype=torch.long, device=target.device), _shape(target, nodes)

    def run() -> list[int]:
        if exact_keys is None:
            return target.likeliest(target.verify(cache, tokens, shape))[1]
        return tiled.largest(target.exact_logits(target.verify_exact(cache, tokens, shape, exact_keys)))[1].tolist()

    return run


def several_trees(target: Target, cache: KVCache, sizes: list[int]) -> Callable[[], list[int]]:
    """``one_tree`` of several sequences that share the pass."""
    tokens = torch.ones(sum(sizes), dtype=torch.long, device=target.device)
    shapes = [_shape(target, nodes) for nodes in sizes]
    return lambda: target.likeliest(target.verify_trees(cache, tokens, shapes))[1]


def _shape(target: Target, nodes: int) -> TreeShape:
    """A tree of so many nodes, as wide as the target takes it."""
    return TreeShape.chain(nodes) if target.chains_only else TreeShape([-1, *([0] * (nodes - 1))])


def _several(target: Target, one: KVCache, slots: int) -> KVCache:
    """The sequence of a cache ``SEVERAL`` times."""
    cache = target.new_cache(SEVERAL, slots)
    for i in range(SEVERAL):
        cache.copy_sequence(i, one, 0)
    return cache


def _after_rejection(target: Target, ids: list[int], slots: int) -> KVCache:
    """A cache of these tokens of which recurrent layers have to run the last ones again, as they do behind a rejected draft."""
    cache, again = target.new_cache(1, slots), min(AGAIN, len(ids) - 1)
    tokens = torch.tensor([*ids, ids[0]], device=target.device)
    begin = len(ids) - again
    target.prefill(tokens[None, :begin], cache)
    target.verify(cache, tokens[begin:], TreeShape.chain(again + 1))
    cache.compact(list(range(again)))
    return cache


def cached_costs(
    target: Target,
    drafter: Drafter,
    plan: TreePlan,
    exact: bool = False,
    fresh: bool = False,
    batch: bool = False,
) -> Costs:
    """Costs of this machine, target, drafter, dtype, quantisation, threads and plan, from the user's cache if known.

    On a busy machine they are measured again, and if it stays busy, they serve once and are not kept. Known ones that passes
    are twice as fast as are measured anew.

    Ranks that a target is divided among take rank 0's, so that all draft the same trees.
    """
    ranks = target.ranks
    key: dict[str, Any] = {
        "machine": platform.node() + platform.machine() + platform.processor(),
        "device": torch.cuda.get_device_name() if target.device.type == "cuda" else "cpu",
        "target": target.name,
        "drafter": drafter.name,  # a draft costs what its drafter costs
        "layers": target.layer_count,
        "dtype": str(target.dtype),
        "quantize": target.quantize,
        "compiled": (fast := target.compiled) is not None
        and ("exact" if exact else "trees" if batch else "tree") in fast.runner.kinds
        and fast.runner.name,
        "kernel": tiled.used(target.dtype),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "plan": [plan.kind, plan.depth, plan.top_k],
        "exact": exact,
        "batch": SEVERAL if batch else 0,
    }
    if ranks.count > 1:
        key["ranks"] = ranks.count
    path = cache_dir() / "costs.json"
    known = kept_entries(path)
    names = {field.name for field in fields(Costs)}
    kept = next((e["costs"] for e in known if e.get("key") == key and set(e.get("costs", ())) == names), None)
    kept = ranks.agree_on(None if fresh else kept)
    if kept is not None:
        costs = Costs(**kept)
        if exact or batch or ranks.agree_on(still_true(costs, target)):
            return costs
    for _ in range(TRIES):
        costs = Costs(**ranks.agree_on(measure(target, drafter, plan, exact, batch).__dict__))
        if costs.steady:
            break
    if not (costs.steady and ranks.leads):
        return costs
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        others = [entry for entry in known if entry.get("key") != key]
        write_json(path, [*others, {"key": key, "costs": costs.__dict__}])
    except OSError:
        pass  # a read-only home: measured again next time
    return costs
