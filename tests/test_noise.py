"""The noise that a sampler and its drafter share: its distribution, and what drafts gain by it; by PyTorch and by our kernel."""

from __future__ import annotations

import shutil
from itertools import pairwise

import numpy as np
import pytest
import torch
from scipy.stats import chisquare, kstest

from beagle.decoding.noise import draw, gumbel, noise_key
from beagle.decoding.sampling import Sampler, SamplingParams, choose_all
from beagle.drafters.base import TreePlan
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.linears import tiled
from conftest import tiny_drafter, tiny_target

KERNEL = pytest.param(
    "kernel",
    marks=[
        pytest.mark.slow,
        pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="no C++ compiler"),
        pytest.mark.skipif(not torch.cpu._is_avx512_bf16_supported(), reason="this CPU has no AVX-512 BF16"),
    ],
)
MASK = (1 << 64) - 1
STEP, MIX, MIX_AGAIN = 0x9E3779B97F4A7C15, 0xBF58476D1CE4E5B9, 0x94D049BB133111EB
PLANS = {
    "chain": TreePlan("chain", depth=4),
    "static": TreePlan("static", depth=4),
    "dynamic": TreePlan("dynamic", depth=4, top_k=4, nodes=12),
}


@pytest.fixture(autouse=True, params=["torch", KERNEL])
def by(request):
    if request.param == "kernel":
        assert tiled.load(request.getfixturevalue("kernel_folder"))
    return request.param


def splitmix(key: int, size: int) -> list[int]:
    """SplitMix64 as its authors wrote it."""
    out = []
    for i in range(1, size + 1):
        z = (key + i * STEP) & MASK
        z = ((z ^ (z >> 30)) * MIX) & MASK
        z = ((z ^ (z >> 27)) * MIX_AGAIN) & MASK
        out.append(z ^ (z >> 31))
    return out


def key_of(number: int) -> int:
    """The int64 key with which SplitMix64's first number is this one."""
    z = number
    for shift, factor in ((31, MIX_AGAIN), (27, MIX), (30, 1)):
        z = (z ^ (z >> shift) ^ (z >> 2 * shift)) * pow(factor, -1, 1 << 64) & MASK
    z = (z - STEP) & MASK
    return z - (1 << 64) if z >> 63 else z


def right(number: int) -> float:
    """Noise of one of SplitMix64's numbers, in fp64."""
    uniform = np.clip(np.float32(number & (MASK >> 1)) * 2.0**-63, 2.0**-64, 1 - 2.0**-24)
    return float(-np.log(-np.log1p(-np.float64(uniform))))


def row(key: int, size: int) -> torch.Tensor:
    return gumbel([key], torch.arange(size))[0]


@pytest.mark.parametrize("key", [0, 1, -1, 2**63 - 1, -(2**63), 123456789])
def test_noise_is_that_of_splitmix64(key):
    numbers = splitmix(key, 200)
    assert key_of(numbers[0]) == key
    np.testing.assert_allclose(row(key, 200).numpy(), [right(z) for z in numbers], rtol=3e-7, atol=3e-7)


def test_noise_is_right_in_its_tails_and_about_zero():
    numbers = [0, 1, 2, 3, 2**63 - 1, 2**63 - 2**39, 2**63 - 2**40, 2**62, 2**61, 2**61 + 2**38]
    numbers += [*(int(2**63 * (1 - np.exp(-1)) * scale) for scale in (0.999, 1, 1.001))]  # noise is 0 there
    random = np.random.default_rng(0)
    numbers += [int(random.integers(2**62)) >> shift for shift in range(62) for _ in range(20)]
    numbers += [int(number) for number in random.integers(2**63, size=3000)]
    found = gumbel([key_of(number) for number in numbers], torch.tensor([0]))[:, 0]
    expected = np.array([right(number) for number in numbers])
    assert found.max() == pytest.approx(64 * np.log(2))
    assert found.min() == pytest.approx(-np.log(24 * np.log(2)))
    units = np.spacing(np.maximum(np.abs(expected), 0.5).astype(np.float32))
    assert (np.abs(found.double().numpy() - expected) / units).max() < 2.5


def test_noise_of_a_million_tokens_is_gumbel():
    drawn = row(noise_key(5, 0), 1_000_000).double().numpy()
    assert kstest(drawn, "gumbel_r").pvalue > 1e-3
    assert kstest(drawn * 1.01, "gumbel_r").pvalue < 1e-3  # it can fail
    assert abs(drawn.mean() - 0.5772157) < 4 * np.pi / 6**0.5 / 1e3


@pytest.mark.parametrize("size", [1, 15, 16, 17, 49153])
def test_some_tokens_have_the_noise_that_they_have_among_all(size):
    keys = [noise_key(1, position) for position in range(3)]
    whole = gumbel(keys, torch.arange(size))
    some = torch.randperm(size, generator=torch.Generator().manual_seed(0))[: size // 3 + 1]
    assert torch.equal(gumbel(keys, some), whole[:, some])
    assert torch.equal(gumbel(keys, torch.stack([some, some], 1)[:, 0]), whole[:, some])  # in no one piece
    assert torch.equal(row(keys[1], size), whole[1])


def test_noise_depends_on_seed_and_position():
    found = [row(noise_key(*of), 50) for of in ((7, 3), (8, 3), (7, 2), (-7, 3), (2**64 - 7, 3), (7, 3))]
    assert torch.equal(found[0], found.pop())
    assert not any(torch.equal(other, found[0]) for other in found[1:])


def test_drafters_are_told_the_noise_of_the_sampler():
    sampler, some = Sampler(SamplingParams(temperature=0.7, seed=5)), torch.tensor([5, 3, 60])
    found = sampler.noise(4)([1, 3], some)
    expected = torch.stack([row(sampler.key(position), 64)[some] for position in (4, 6)])
    assert torch.equal(found, expected * 0.7)


def told(logits: torch.Tensor, key: int, temperature: float) -> int:
    """The choice, written the long way."""
    scores = (logits.double() - logits.double().max()) / temperature + row(key, len(logits)).double()
    return int(scores.numpy().argmax())


@pytest.mark.parametrize("size", [1, 5, 16, 17, 1000, 49153])
@pytest.mark.parametrize("temperature", [0.3, 1.0, 1.7, 1e-300, 1e38, 1e300])
def test_the_choice_is_the_largest_with_noise(size, temperature):
    random = torch.Generator().manual_seed(size)
    keys = [noise_key(seed, 1) for seed in range(40)]
    for spread in (0.5, 4.0, 1e38):
        logits = (torch.randn(len(keys), size, generator=random) * spread).clamp(-3e38, 3e38).bfloat16()
        logits[:: len(keys) // 2, : size // 2] = -torch.inf
        largest, tokens = draw(logits, keys, temperature)
        assert torch.equal(largest.bfloat16(), logits.amax(-1))
        assert tokens.tolist() == [told(own, key, temperature) for own, key in zip(logits, keys, strict=True)]


def test_the_choice_among_equals_is_the_first():
    found = row(key := noise_key(0, 0), 49152).numpy()
    order = np.argsort(found, kind="stable")
    pairs = [(int(a), int(b)) for a, b in pairwise(order) if found[a] == found[b]]
    assert len(pairs) > 10
    for first, second in pairs:
        logits = torch.full((49152,), -torch.inf, dtype=torch.bfloat16)
        logits[first], logits[second] = 0.0, 5.0  # at this temperature the same
        assert draw(logits[None], [key], 1e300)[1].tolist() == [first]


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("place", [0, 17, 36])
def test_a_choice_among_no_numbers_is_refused(value, place):
    logits = torch.zeros(37, dtype=torch.bfloat16)
    logits[place] = value
    with pytest.raises(BeagleError, match=f"the target: its logits are {value}, so"):
        Sampler(SamplingParams(temperature=1.0)).choose(logits, 0)
    with pytest.raises(BeagleError, match="its logits are -inf"):
        Sampler(SamplingParams(temperature=1.0)).choose(torch.full_like(logits, -torch.inf), 0)


@pytest.mark.parametrize("others", [{}, {"repetition_penalty": 1.2}, {"top_p": 0.9}, {"temperature": 0.0}], ids=str)
def test_a_choice_is_the_same_beside_others(others):
    logits = (torch.randn(4, 300, generator=torch.Generator().manual_seed(0)) * 2).bfloat16()
    for seed in range(30):
        samplers = [Sampler(SamplingParams(temperature=1.0, seed=seed + i)) for i in range(3)]
        samplers.insert(1, Sampler(SamplingParams(**{"temperature": 1.0, "seed": seed, **others}), prompt=[3, 4]))
        alone = [one.choose(own, 7) for one, own in zip(samplers, logits, strict=True)]
        assert choose_all(samplers, logits, [7] * 4) == alone


def test_noise_is_independent_over_tokens_positions_and_seeds():
    drawn = torch.stack([gumbel([noise_key(seed, at) for at in range(20)], torch.arange(500)) for seed in range(20)])
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
    logits = torch.randn(12, generator=torch.Generator().manual_seed(0)).mul(1.5).bfloat16()
    sampling = SamplingParams(**{"temperature": 1.0, "seed": 3, **options})
    p = Sampler(sampling).probabilities(Sampler(sampling).process(logits)).numpy()
    sampler, counts = Sampler(sampling), np.zeros(12)
    for position in range(4000):
        counts[sampler.choose(logits, position)] += 1
    assert not counts[p == 0].any()
    assert chisquare(counts[p > 0], p[p > 0] * 4000).pvalue > 1e-3
    assert chisquare(counts[p > 0], (p[p > 0] ** 0.7) / (p[p > 0] ** 0.7).sum() * 4000).pvalue < 1e-3  # it can fail


def test_temperatures_beyond_reason_are_served():
    logits = torch.tensor([1.0, 3.0, 2.0], dtype=torch.bfloat16)
    assert Sampler(SamplingParams(temperature=1e-300)).choose(logits, 0) == 1
    sampler = Sampler(SamplingParams(temperature=1e300))
    assert {sampler.choose(logits, position) for position in range(50)} == {0, 1, 2}
    assert sampler.noise(0)([1], torch.arange(3)).isfinite().all()


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


def test_answers_in_bf16_are_the_same_with_drafts_and_without():
    target = tiny_target(dtype=torch.bfloat16)
    target.eos_ids = frozenset()
    model = Model(target, SmallModelDrafter(target, target), PLANS["chain"])
    for seed in range(4):
        sampling = {"temperature": 1.0, "max_new_tokens": 21, "seed": seed}
        plain = model.generate([3, 7, 5], draft=False, exact=True, **sampling)
        drafted = model.generate([3, 7, 5], exact=True, **sampling)
        assert drafted.token_ids == plain.token_ids
        assert drafted.stats.tau > 3


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
    scores = torch.log_softmax(calls[0][1][1] + noise([1], drafter.head.draft_vocab)[0], -1)
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
