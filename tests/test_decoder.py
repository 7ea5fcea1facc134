"""Sequences that enter, decode and leave at any time: each gets what it gets alone, whatever happens to others."""

from __future__ import annotations

import random

import pytest
import torch

from beagle.decoding.decoder import Decoder
from beagle.decoding.prefixes import PrefixCache
from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.decoding.sequence import Sequence
from beagle.drafters.base import TreePlan
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from conftest import FAMILIES, LIVELY, tiny_drafter, tiny_target

CHAIN, STATIC, DYNAMIC = (TreePlan(form, depth=4, top_k=4, nodes=12) for form in ("chain", "static", "dynamic"))
ENDS = frozenset({2, 17, 30, 41})


def drafter(name: str, target):
    if name == "head+lookup":
        return CombinedDrafter(tiny_drafter(target, scale=LIVELY["beagle"]), LookupDrafter())
    if name == "small":
        return SmallModelDrafter(target, tiny_target())
    if name == "lookup":
        return LookupDrafter()
    return tiny_drafter(target, architecture=name, scale=LIVELY[name]) if name in LIVELY else None


def requests(seed: int, count: int = 12) -> list[tuple[list[int], SamplingParams]]:
    """Prompts of all lengths, some with a common beginning; greedy and sampled, with penalties and without."""
    rng = random.Random(seed)
    system = [rng.randrange(3, 64) for _ in range(30)]
    found = []
    for i in range(count):
        own = [rng.randrange(3, 64) for _ in range(rng.choice((1, 2, 5, 17, 40)))]
        ids = [*system[: rng.choice((0, 8, 30))], *own]
        options = rng.choice(({}, {}, {"temperature": 0.9, "top_p": 0.9}, {"repetition_penalty": 1.3}))
        found.append((ids, SamplingParams(max_new_tokens=rng.choice((1, 2, 7, 20, 33)), seed=i, **options)))
    return found


def sequence_of(target, ids: list[int], sampling: SamplingParams, **options) -> Sequence:
    sampler = Sampler(sampling, prompt=ids, eos_ids=target.eos_ids)
    return Sequence(ids, sampling.max_new_tokens, sampler, **options)


def alone(target, ids: list[int], sampling: SamplingParams, exact: bool = False) -> list[int]:
    return Model(target).generate(ids, sampling, exact=exact).token_ids


def until_done(decoder: Decoder, *more: Sequence) -> list[Sequence]:
    """Everybody's turn until all have left; the sequences that have failed."""
    failed = []
    decoder.enter(more)
    for _ in range(1000):
        for one, _ in decoder.step():
            if one.error is not None:
                failed.append(one)
        if decoder.free == decoder.size:
            return failed
    raise AssertionError("some sequence never ends")


def schedule(decoder: Decoder, waiting: list[Sequence], seed: int, chance: float = 0.1) -> set[Sequence]:
    """Sequences come in at random steps, some are given up (with this chance a step); returns those."""
    rng = random.Random(seed)
    waiting, given_up = list(waiting), set()
    started: list[Sequence] = []
    while waiting or decoder.free < decoder.size:
        entering = [waiting.pop(0) for _ in range(min(len(waiting), decoder.free, rng.randrange(3)))]
        decoder.enter(entering)
        started += entering
        seen = {}
        for one, emitted in decoder.step():
            assert one.error is None, one.error
            assert one not in seen
            seen[one] = emitted
        if rng.random() < chance and (candidates := [one for one in started if not one.ended]):
            one = rng.choice(candidates)
            free = decoder.free
            decoder.leave(one)
            decoder.leave(one)  # twice does no harm
            assert decoder.free == free + 1
            given_up.add(one)
    return given_up


# families differ in the target's pass, drafters and plans in what it verifies
CASES = [
    *[(family, "beagle", DYNAMIC) for family in FAMILIES],
    *[("llama", name, DYNAMIC) for name in ("plain", "eagle", "lookup", "head+lookup", "small")],
    *[("gemma3_text", name, DYNAMIC) for name in ("plain", "head+lookup", "small")],
    *[("llama", "beagle", plan) for plan in (CHAIN, STATIC)],
]


@pytest.mark.parametrize("keeping", [False, True], ids=["", "prefixes"])
@pytest.mark.parametrize(("family", "name", "plan"), CASES)
def test_any_schedule_gives_each_its_own_answer(family, name, plan, keeping):
    target = tiny_target(family)
    target.eos_ids = ENDS
    prefixes = PrefixCache(120) if keeping else None
    decoder = Decoder(
        target, size=4, drafter=drafter(name, target), plan=plan, prefixes=prefixes, piece=8 if keeping else None
    )
    asked = requests(seed=len(family) + len(name))
    sequences = [sequence_of(target, ids, sampling, drafts=i % 4 != 3) for i, (ids, sampling) in enumerate(asked)]
    given_up = schedule(decoder, sequences, seed=len(family))
    for one, (ids, sampling) in zip(sequences, asked, strict=True):
        expected = alone(target, ids, sampling)
        assert one.tokens == (expected if one not in given_up else expected[: len(one.tokens)])
        assert one.stats.tokens == len(one.tokens)
        assert one.context is None
        assert one.cache is None
    if prefixes is not None:
        assert 0 < prefixes.tokens <= 120
        assert any(one.cached_tokens for one in sequences)
        assert all(one.cached_tokens < len(one.ids) for one in sequences)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", ["plain", "beagle", "head+lookup"])
def test_exact_sequences_have_the_bits_that_they_have_alone(name, dtype):
    target = tiny_target("gemma3_text", dtype=dtype)
    target.eos_ids = ENDS
    asked = [
        (list(range(3, 3 + n)), SamplingParams(max_new_tokens=most, temperature=warm, seed=n))
        for n, most, warm in ((5, 90, 0.0), (41, 20, 0.0), (2, 33, 0.8), (17, 120, 0.0), (9, 3, 0.8))
    ]

    def watched(ids, sampling):
        seen = []
        watch = lambda step: seen.append((step.states[step.path].clone(), step.logits[step.path].clone()))  # noqa: E731
        return sequence_of(target, ids, sampling, watch=watch), seen

    def bits(seen):
        return [torch.cat(part) for part in zip(*seen, strict=True)]

    expected = []
    for ids, sampling in asked:
        one, seen = watched(ids, sampling)
        until_done(Decoder(target, exact=True), one)
        expected.append((one.tokens, *bits(seen)))
    decoder = Decoder(target, size=3, drafter=drafter(name, target), plan=DYNAMIC, exact=True)
    together = [watched(ids, sampling) for ids, sampling in asked]
    assert not schedule(decoder, [one for one, _ in together], seed=4, chance=0.0)
    for (one, seen), (tokens, states, logits) in zip(together, expected, strict=True):
        assert one.tokens == tokens
        own_states, own_logits = bits(seen)
        assert torch.equal(own_states, states)
        assert torch.equal(own_logits, logits)


def test_a_watcher_sees_its_own_sequence():
    target = tiny_target()
    target.eos_ids = frozenset()
    decoder = Decoder(target, size=3, drafter=drafter("beagle", target), plan=DYNAMIC)
    steps: list[list] = [[], [], []]
    sequences = [
        sequence_of(target, list(range(3, 3 + n)), SamplingParams(max_new_tokens=25 - n), watch=steps[i].append)
        for i, n in enumerate((4, 9, 2))
    ]
    until_done(decoder, *sequences)
    for one, seen in zip(sequences, steps, strict=True):
        chosen = torch.cat([step.logits[step.path] for step in seen])
        assert chosen.argmax(-1).tolist() == one.tokens
        assert torch.allclose(target.logits(torch.cat([step.states[step.path] for step in seen])), chosen, atol=1e-4)
        for step in seen:
            assert len(step.tokens) == len(step.shape.parents) == len(step.states) == len(step.logits)
        assert [step.tokens[0] for step in seen] == [one.ids[-1], *(seen_token for seen_token in roots(seen))]


def roots(steps):
    """The first token of each iteration's tree is the last one of the iteration before."""
    return [int(step.logits[step.path[-1]].argmax()) for step in steps[:-1]]
