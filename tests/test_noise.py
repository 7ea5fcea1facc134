"""The noise that a sampler and its drafter share: its distribution, and what drafts gain by it."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from beagle.decoding.noise import Noise, gumbel
from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.drafters.base import TreePlan
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.model import Model
from conftest import tiny_drafter, tiny_target

CPU = torch.device("cpu")
PLANS = {
    "chain": TreePlan("chain", depth=4),
    "static": TreePlan("static", depth=4),
    "dynamic": TreePlan("dynamic", depth=4, top_k=4, nodes=12),
}


def splitmix(key: int, size: int) -> list[int]:
    """SplitMix64 as its authors wrote it."""
    mask, out = (1 << 64) - 1, []
    for i in range(1, size + 1):
        z = (key + i * 0x9E3779B97F4A7C15) & mask
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        out.append(z ^ (z >> 31))
    return out


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_noise_is_that_of_splitmix64(key):
    uniform = np.array([(z & (2**63 - 1)) / 2**63 for z in splitmix(key, 200)])
    np.testing.assert_allclose(gumbel(key, 200, CPU).numpy(), -np.log(-np.log1p(-uniform)), rtol=1e-4, atol=1e-5)


def test_noise_depends_on_seed_position_and_token_alone():
    noise = Noise(7)
    first = noise.at(3, 50, CPU).clone()
    noise.at(4, 80, CPU)
    assert torch.equal(noise.at(3, 80, CPU)[:50], first)
    assert torch.equal(noise.at(3, 20, CPU), first[:20])
    assert torch.equal(Noise(7).at(3, 50, CPU), first)
    others = [
        Noise(8).at(3, 50, CPU),
        Noise(7).at(2, 50, CPU),
        Noise(-7).at(3, 50, CPU),
        Noise(2**64 - 7).at(3, 50, CPU),
    ]
    assert not any(torch.equal(other, first) for other in others)


def test_past_positions_are_forgotten():
    sampler = Sampler(SamplingParams(temperature=1.0))
    for position in range(5):
        sampler.noise(position)(3, 8, CPU)
        sampler.choose(torch.zeros(8), position)
    assert set(sampler._noise._known) == {4, 5, 6}


def test_noise_is_gumbel_and_its_tokens_positions_and_seeds_independent():
    drawn = torch.stack([torch.stack([Noise(seed).at(at, 500, CPU) for at in range(20)]) for seed in range(20)])
    assert kstest(drawn.flatten()[:50_000].numpy(), "gumbel_r").pvalue > 1e-3
    flat = drawn - drawn.mean()
    for one, other in [
        (flat[:, :, 1:], flat[:, :, :-1]),
        (flat[:, 1:], flat[:, :-1]),
        (flat[1:], flat[:-1]),
    ]:
        correlation = float((one * other).mean() / flat.var())
        assert abs(correlation) < 4 / one.numel() ** 0.5


@pytest.mark.parametrize(
    "options",
    [{}, {"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.2}, {"temperature": 0.4}, {"logit_bias": {3: 1.5}}],
    ids=str,
)
def test_choices_follow_the_distribution(options):
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)) * 1.5
    sampling = SamplingParams(**{"temperature": 1.0, "seed": 3, **options})
    p = Sampler(sampling).probabilities(Sampler(sampling).process(logits)).numpy()
    sampler, counts = Sampler(sampling), np.zeros(12)
    for position in range(4000):
        counts[sampler.choose(logits, position)] += 1
    assert not counts[p == 0].any()
    assert chisquare(counts[p > 0], p[p > 0] * 4000).pvalue > 1e-3
    assert chisquare(counts[p > 0], (p[p > 0] ** 0.7) / (p[p > 0] ** 0.7).sum() * 4000).pvalue < 1e-3  # it can fail


def test_temperatures_beyond_reason_are_served():
    logits = torch.tensor([1.0, 3.0, 2.0])
    assert Sampler(SamplingParams(temperature=1e-300)).choose(logits, 0) == 1
    sampler = Sampler(SamplingParams(temperature=1e300))
    assert {sampler.choose(logits, position) for position in range(50)} == {0, 1, 2}
    assert sampler.noise(0)(1, 3, CPU).isfinite().all()


def test_greedy_answers_have_no_noise():
    assert Sampler(SamplingParams(repetition_penalty=1.5)).noise(0) is None


@pytest.fixture(scope="module")
def target():
    target = tiny_target()
    target.eos_ids = frozenset()
    return target


@pytest.mark.parametrize("plan", ["chain", "static"])
def test_a_drafter_that_knows_the_target_knows_its_draws(target, plan):
    """The target drafts for itself, so that the noise is all there is to know: whole chains are accepted."""
    model = Model(target, SmallModelDrafter(target, target), PLANS[plan])
    for options in ({}, {"temperature": 0.5}, {"seed": 9}):
        sampling = {"temperature": 1.0, "max_new_tokens": 21, **options}
        plain = model.generate([3, 7, 5], draft=False, **sampling)
        drafted = model.generate([3, 7, 5], **sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.tau > 4.9


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
def test_a_head_proposes_the_winners_of_its_logits_and_the_noise(target, plan):
    drafter = tiny_drafter(target, draft_vocab_size=48)
    levels, calls = drafter.eager, []
    drafter.eager = lambda *given: calls.append(levels(*given)) or calls[-1]
    drafter.eager.embed = levels.embed
    states = target.prefill(torch.tensor([[3, 7, 5]]), target.new_cache(1, 16))[0]
    contexts = [drafter.context() for _ in range(3)]
    noise = Sampler(SamplingParams(temperature=0.7, seed=5)).noise(4)
    for context in contexts:
        context.extend([3, 7, 5], states)
    contexts[1].noise = noise
    drafts = drafter.draft(contexts, [9, 9, 9], plan)
    scores = torch.log_softmax(calls[0][1][1] + noise(1, 64, CPU)[drafter.head.draft_vocab], -1)
    best = scores.topk(plan.width if plan.kind != "static" else 6)
    roots = [i for i, parent in enumerate(drafts[1].parents) if parent < 0]
    found = {drafts[1].tokens[i]: drafts[1].scores[i] for i in roots}
    expected = dict(zip(drafter.head.draft_vocab[best.indices].tolist(), best.values.tolist(), strict=True))
    assert {token: pytest.approx(expected[token], abs=1e-4) for token in found} == found
    assert drafts[0] == drafts[2]  # greedy beside it
    contexts[0].noise = None
    assert drafter.draft(contexts[:1], [9], plan)[0].tokens == drafts[0].tokens
    assert drafts[1].tokens != drafts[0].tokens


def test_noise_reaches_the_head_of_a_combined_drafter(target):
    head = tiny_drafter(target)
    combined = CombinedDrafter(head, LookupDrafter())
    states = target.prefill(torch.tensor([[3, 7, 5]]), target.new_cache(1, 16))[0]
    context = combined.context()
    context.extend([3, 7, 5], states)
    context.noise = Sampler(SamplingParams(temperature=1.0)).noise(0)
    plan = PLANS["chain"]
    (with_noise,) = combined.draft([context], [9], plan)
    alone = head.context()
    alone.extend([3, 7, 5], states)
    alone.noise = context.noise
    assert with_noise.tokens == head.draft([alone], [9], plan)[0].tokens
    context.noise = None
    assert combined.draft([context], [9], plan)[0].tokens != with_noise.tokens
