"""Sampled answers follow the target's own distribution, drafted or not."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from beagle.decoding.decoder import Decoder, decode
from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.decoding.sequence import Sequence
from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from conftest import tiny_drafter, tiny_target

VOCABULARY, PROMPT, DRAWN = 12, [3, 7, 5], 3
TEMPERATURE, TOP_P = 0.8, 0.9
PLANS = {
    "plain": None,
    "chain": TreePlan("chain", depth=3),
    "dynamic": TreePlan("dynamic", depth=3, top_k=4, nodes=10),
}


@pytest.fixture(scope="module")
def small():
    target = tiny_target(vocab_size=VOCABULARY, hidden_size=16, num_hidden_layers=1, scale=9.0)
    target.eos_ids = frozenset()
    return target


def nucleus(logits: np.ndarray) -> dict[int, float]:
    """Temperature and top-p, written the long way."""
    p = np.exp((logits - logits.max()) / TEMPERATURE)
    p /= p.sum()
    kept: dict[int, float] = {}
    for token in sorted(range(len(p)), key=lambda t: -p[t]):
        kept[token] = float(p[token])
        if sum(kept.values()) >= TOP_P:
            break
    total = sum(kept.values())
    return {token: share / total for token, share in kept.items()}


@pytest.fixture(scope="module")
def truth(small) -> dict[tuple[int, ...], float]:
    """Chance of every sequence of ``DRAWN`` tokens, by running each prefix alone."""
    chances: dict[tuple[int, ...], float] = {(): 1.0}
    for _ in range(DRAWN):
        longer = {}
        for prefix, chance in chances.items():
            ids = torch.tensor([PROMPT + list(prefix)])
            logits = small.logits(small.prefill(ids, small.new_cache(1, 16))[0, -1])
            for token, share in nucleus(logits.double().numpy()).items():
                longer[(*prefix, token)] = chance * share
        chances = longer
    assert sum(chances.values()) == pytest.approx(1.0)
    assert len(chances) > 50
    return chances


class KnownCache:
    """Stands in for the KV cache: the tokens themselves."""

    batch, capacity = 1, 64

    def __init__(self) -> None:
        self.ids: tuple[int, ...] = ()

    @property
    def length(self):
        return len(self.ids)

    @property
    def lengths(self):
        return [len(self.ids)]

    def compact_sequences(self, paths):
        self.ids += tuple(self.tree[i] for i in paths[0])


class KnownContext:
    ids: tuple[int, ...] = ()

    def extend(self, tokens, states):
        self.ids += tuple(tokens)


class Known:
    """The target and its drafter, every pass remembered, so that thousands of answers are cheap."""

    def __init__(self, target) -> None:
        self.target, self.drafter = target, tiny_drafter(target)
        self.device, self.eos_ids, self.context_limit = target.device, target.eos_ids, target.context_limit
        self.context_ends, self.chains_only, self.name = False, False, "known"
        self.passes, self.drafts, self.heads = {}, {}, {}

    def new_cache(self, batch, capacity):
        return KnownCache()

    def with_room(self, cache, slots):
        return cache

    def real(self, ids):
        cache = self.target.new_cache(1, 32)
        return cache, self.target.prefill(torch.tensor([ids]), cache)[0]

    def prefill(self, ids, cache):
        cache.ids = tuple(ids[0].tolist())
        if cache.ids not in self.passes:
            self.passes[cache.ids] = self.real(cache.ids)[1]
        return self.passes[cache.ids][None]

    def verify(self, cache, tokens, shape):
        cache.tree = tuple(tokens.tolist())
        key = cache.ids, cache.tree, tuple(shape.parents)
        if key not in self.passes:
            self.passes[key] = self.target.verify(self.real(cache.ids)[0], tokens, shape)
        return self.passes[key]

    def logits(self, states):
        key = id(states) if states.ndim == 2 else states.data_ptr()
        if key not in self.heads:
            self.heads[key] = self.target.logits(states), states  # kept alive, so that ids stay its own
        return self.heads[key][0]

    def context(self):
        return KnownContext()

    def draft(self, contexts, roots, plan, min_expected_tokens=0.0):
        ((context,), (root,)) = contexts, roots
        key = context.ids, root, plan
        if key not in self.drafts:
            own = self.drafter.context()
            own.extend(list(context.ids), self.real(context.ids)[1])
            self.drafts[key] = self.drafter.draft([own], [root], plan)
        return self.drafts[key]


def draw(target, drafter, plan, seed: int, stats: Stats) -> tuple[int, ...]:
    sampler = Sampler(SamplingParams(temperature=TEMPERATURE, top_p=TOP_P, seed=seed))
    decoder = Decoder(target, drafter=drafter if plan else None, plan=plan)
    steps = decode(decoder, Sequence(PROMPT, DRAWN, sampler, stats=stats))
    return tuple(itertools.chain.from_iterable(step.tokens for step in steps))


def fits(draws: list[tuple[int, ...]], truth: dict[tuple[int, ...], float]) -> float:
    """p-value of the draws, cells of fewer than 5 expected ones merged."""
    assert set(draws) <= truth.keys()  # nothing outside top-p
    counts = dict.fromkeys(truth, 0)
    for drawn in draws:
        counts[drawn] += 1
    cells = [(counts[key], chance * len(draws)) for key, chance in truth.items()]
    common = [cell for cell in cells if cell[1] >= 5]
    rare = [cell for cell in cells if cell[1] < 5]
    if rare:
        common.append((sum(c for c, _ in rare), sum(e for _, e in rare)))
    observed, expected = zip(*common, strict=True)
    return float(chisquare(observed, np.array(expected) * (sum(observed) / sum(expected))).pvalue)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["chain", "dynamic"])
def test_distribution_over_many_draws(small, truth, kind):
    known, stats = Known(small), Stats()
    draws = [draw(known, known, PLANS[kind], seed, stats) for seed in range(20_000)]
    assert stats.tau > 1.05  # drafts were accepted, so this tests something
    assert fits(draws, truth) > 1e-3


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "architecture"), [*((kind, "beagle") for kind in PLANS), ("dynamic", "eagle")])
def test_distribution_of_the_whole_loop(small, truth, kind, architecture):
    drafter, stats = tiny_drafter(small, architecture=architecture), Stats()
    draws = [draw(small, drafter, PLANS[kind], seed, stats) for seed in range(50_000, 50_400)]
    assert fits(draws, truth) > 1e-3
    plain = [draw(small, None, None, seed, Stats()) for seed in range(50_000, 50_050)]
    assert draws[:50] == plain


def test_the_chi_square_would_notice(truth):
    """The same check refuses draws of a slightly other distribution."""
    random = np.random.default_rng(0)
    keys = list(truth)
    flat = np.array(list(truth.values())) ** 0.8
    draws = [keys[i] for i in random.choice(len(keys), 20_000, p=flat / flat.sum())]
    assert fits(draws, truth) < 1e-6


scores = st.lists(st.floats(-30, 30), min_size=1, max_size=12)


@settings(max_examples=300, deadline=None)
@given(scores, st.integers(0, 14), st.floats(0.01, 1.0), st.floats(0.05, 3.0), st.integers(0, 2**40))
def test_only_tokens_of_the_kept_set_are_chosen(values, top_k, top_p, temperature, seed):
    logits = torch.tensor(values)
    sampler = Sampler(SamplingParams(temperature=temperature, top_k=top_k, top_p=top_p, seed=seed))
    p = sampler.probabilities(logits)
    token = sampler.choose(logits, 0)
    assert p[token] > 0
    assert float(p.sum()) == pytest.approx(1.0)
    order = logits.double().div(temperature)
    above = int((order > order[token]).sum())
    assert not top_k or above < top_k
    full = torch.softmax(
        order.masked_fill(order < order.topk(min(top_k or len(values), len(values))).values[-1], -1e9), 0
    )
    assert float(full[full > full[token]].sum()) < top_p + 1e-9


@given(scores)
def test_greedy_is_argmax(values):
    logits = torch.tensor(values)
    assert Sampler().choose(logits, 0) == int(logits.argmax())
    assert Sampler(SamplingParams(temperature=1.0, top_k=1)).probabilities(logits)[int(logits.argmax())] > 0


BAD = {
    "max_new_tokens": [0, -1, 1.5, True, "8", None],
    "temperature": [-1, float("nan"), float("inf"), "1", None, True],
    "top_k": [-1, 1.5, float("nan")],
    "top_p": [0, 1.1, -0.1, float("nan")],
    "min_p": [-0.1, 1.1, float("nan")],
    "seed": [1.5, 2**64, -(2**63) - 1, None],
    "stop": ["", ["a", ""], 5, [5], None],
    "stop_token_ids": [5, "5", [1.5], [-1]],
    "ignore_eos": [1, None],
    "min_new_tokens": [-1, 257, 0.5],
    "repetition_penalty": [0, -1, float("nan"), float("inf")],
    "presence_penalty": [2.1, -2.1, float("nan")],
    "frequency_penalty": [2.1, -2.1, float("nan")],
    "logit_bias": [[5], {"5": 1.0}, {5: float("nan")}, {-1: 1.0}, {5: "1"}, {5: float("inf")}],
}


@pytest.mark.parametrize(("name", "value"), [(name, value) for name, values in BAD.items() for value in values])
def test_bad_options_are_refused_by_name(name, value):
    with pytest.raises(BeagleError, match=name):
        SamplingParams(**{name: value})
