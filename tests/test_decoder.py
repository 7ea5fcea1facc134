"""Sequences that enter, decode and leave at any time: each gets what it gets alone, whatever happens to others."""

from __future__ import annotations

import random

import pytest
import torch

from beagle.decoding.decoder import Decoder
from beagle.decoding.live_cache import exact_keys
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
KINDS = [
    *[("llama", name, DYNAMIC) for name in ("plain", "eagle", "lookup", "head+lookup", "small")],
    *[("gemma3_text", name, DYNAMIC) for name in ("plain", "head+lookup", "small")],
    *[("llama", "beagle", plan) for plan in (CHAIN, STATIC)],
]
CASES = [
    *[(family, "beagle", DYNAMIC, True) for family in FAMILIES],
    *[(family, "beagle", DYNAMIC, False) for family in ("llama", "gemma3_text")],
    *[(*kind, keeping) for kind in KINDS for keeping in (False, True)],
]


@pytest.mark.parametrize(("family", "name", "plan", "keeping"), CASES)
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
        for n, most, warm in ((5, 60, 0.0), (41, 20, 0.0), (2, 33, 0.8), (17, 80, 0.0), (9, 3, 0.8))
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


# what goes wrong in one sequence


class Refuses(Exception):
    """What goes wrong in a test."""


def three(target, **options) -> list[Sequence]:
    """Sequences of unequal length, the one in the middle to go wrong."""
    sequences = []
    for i, (n, most) in enumerate(((4, 30), (9, 30), (2, 40))):
        own = options if i == 1 else {}
        sequences.append(sequence_of(target, list(range(3, 3 + n)), SamplingParams(max_new_tokens=most), **own))
    return sequences


def others_go_on(target, decoder: Decoder, sequences: list[Sequence], error: type[Exception] = Refuses) -> Sequence:
    """The one that failed; the others have their own answers."""
    (failed,) = until_done(decoder, *sequences)
    assert isinstance(failed.error, error)
    assert failed.ended
    assert failed.stats.tokens == len(failed.tokens)
    for one in sequences:
        expected = alone(target, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens))
        if one is failed:
            assert one.tokens == expected[: len(one.tokens)]
            assert len(one.tokens) < len(expected)
        else:
            assert one.error is None
            assert one.tokens == expected
    return failed


@pytest.fixture
def endless():
    target = tiny_target()
    target.eos_ids = frozenset()
    return target


@pytest.fixture(params=["together", "one by one"])
def make(request, endless):
    """A decoder for three, whose prompts run together or each alone."""
    prefixes = PrefixCache(400) if request.param == "one by one" else None

    def call(name: str = "beagle", **options) -> Decoder:
        own = options.pop("drafter", None) or drafter(name, endless)
        return Decoder(endless, size=3, drafter=own, plan=DYNAMIC, prefixes=prefixes, **options)

    return call


@pytest.mark.parametrize("at", [0, 3])
def test_a_watcher_that_fails_ends_its_sequence_alone(endless, make, at):
    calls = []

    def watch(step):
        calls.append(step)
        if len(calls) > at:
            raise Refuses

    sequences = three(endless, watch=watch)
    assert others_go_on(endless, make(), sequences) is sequences[1]


@pytest.mark.parametrize("at", [0, 5])
def test_a_sampler_that_fails_ends_its_sequence_alone(endless, make, at):
    class Failing(Sampler):
        def ended(self, token):
            if len(sequences[1].tokens) >= at:
                raise Refuses
            return super().ended(token)

    sequences = three(endless)
    sequences[1].sampler = Failing()
    assert others_go_on(endless, make(), sequences) is sequences[1]


@pytest.mark.parametrize("when", ["made", "prompt", "later"])
def test_a_context_of_the_drafter_that_fails_ends_its_sequence_alone(endless, make, when):
    own, made = LookupDrafter(), []

    def context():
        made.append(LookupDrafter.context(own))
        if len(made) == 2 and when == "made":
            raise BeagleError("no memory")
        if len(made) == 2:
            extend, calls = made[1].extend, []

            def failing(tokens, states):
                calls.append(tokens)
                if when == "prompt" or len(calls) > 3:
                    raise BeagleError("no memory")
                extend(tokens, states)

            made[1].extend = failing
        return made[-1]

    own.context = context
    others_go_on(endless, make(drafter=own), three(endless), BeagleError)


@pytest.mark.parametrize("name", ["lookup", "beagle", "small"])
def test_a_draft_that_fails_ends_its_sequence_alone(endless, make, name):
    """A draft needs room, too: of a small model's cache, say."""
    own = drafter(name, endless)
    draft = own.draft

    def failing(contexts, roots, *rest):
        made = draft(contexts, roots, *rest)
        if any(context is sequences[1].context for context in contexts) and len(sequences[1].tokens) > 5:
            raise BeagleError("no memory")
        return made

    own.draft = failing
    sequences = three(endless)
    assert others_go_on(endless, make(drafter=own), sequences, BeagleError) is sequences[1]


def test_a_head_forgets_no_state_when_it_has_no_memory(endless, monkeypatch):
    """The states that wait for their keys are those of all contexts that draft together."""
    own = drafter("beagle", endless)
    contexts = [own.context() for _ in range(2)]
    for n, context in enumerate(contexts, 20):
        context.extend([3] * n, torch.randn(n, 32))
        context.extend([4], torch.randn(1, 32))
    with monkeypatch.context() as patch:
        patch.setattr(contexts[1], "reserve", lambda capacity: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            own.draft(contexts, [5, 5], DYNAMIC)
    own.draft(contexts, [5, 5], DYNAMIC)
    assert [context.keys for context in contexts] == [21, 22]


@pytest.mark.parametrize("name", ["plain", "lookup"])
def test_numbers_that_are_none_harm_no_other_sequence(endless, make, name):
    """Keys that are NaN are not left where another sequence's mask hides them: NaN times 0 is NaN."""
    sequences = three(endless)
    answers = [alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens)) for one in sequences]
    unused = min(set(range(20, 64)) - {token for answer in answers for token in answer})
    endless.embed.weight.data[unused] = float("nan")
    bad = sequence_of(endless, [*range(3, 20), unused, *range(3, 45)], SamplingParams(max_new_tokens=5))
    decoder = make(name)
    decoder.enter(sequences[:1])
    decoder.step()
    decoder.enter([bad])
    failed = [one for _ in range(2) for one, _ in decoder.step() if one.error is not None]  # in turns with the live one
    assert failed == [bad]
    assert "nan" in str(bad.error)
    assert until_done(decoder, *sequences[1:]) == []
    assert [one.tokens for one in sequences] == answers


def test_numbers_that_turn_bad_harm_no_sequence_that_takes_the_room(endless, make):
    """The longest sequence fails amid its answer; the last one takes its part of the cache."""
    sequences = three(endless)
    decoder = make("plain")
    for i in (1, 0, 2):
        decoder.enter([sequences[i]])
        decoder.step()
    row = decoder.live.index(sequences[1])
    for tensor in decoder._cache.whole.tensors:
        tensor[row, :, 2:15] = float("nan")  # behind what has come so far, too
    failed = until_done(decoder)
    assert failed == [sequences[1]]
    for one in (sequences[0], sequences[2]):
        assert one.tokens == alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens))


def limited(target, monkeypatch, slots: int):
    """No memory for caches of so many slots and more."""
    new_cache = target.new_cache

    def limit(batch, capacity):
        if batch * capacity >= slots:
            raise BeagleError(f"no memory for {batch} times {capacity}")
        return new_cache(batch, capacity)

    monkeypatch.setattr(target, "new_cache", limit)


def test_no_memory_for_the_longest_answer_ends_it_alone(endless, make, monkeypatch):
    sequences = three(endless)
    expected = [alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens)) for one in sequences]
    sequences[1] = sequence_of(endless, list(range(3, 12)), SamplingParams(max_new_tokens=400))
    limited(endless, monkeypatch, 3 * 300)
    failed = until_done(make(), *sequences)
    assert failed == [sequences[1]]
    assert [sequences[0].tokens, sequences[2].tokens] == [expected[0], expected[2]]


def test_no_memory_to_grow_ends_the_longest_alone(endless, make, monkeypatch):
    monkeypatch.setattr("beagle.decoding.live_cache.FIRST_SLOTS", 10)
    sequences = three(endless)
    sequences[1] = sequence_of(endless, list(range(3, 12)), SamplingParams(max_new_tokens=300))
    expected = [alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens)) for one in sequences]
    limited(endless, monkeypatch, 3 * 150)
    failed = until_done(make("plain"), *sequences)
    assert failed == [sequences[1]]
    assert sequences[1].tokens == expected[1][: len(sequences[1].tokens)]
    assert [sequences[0].tokens, sequences[2].tokens] == [expected[0], expected[2]]


def test_an_exact_pass_that_fails_ends_its_sequence_alone(endless, monkeypatch):
    sequences = three(endless)
    expected = [alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens), True) for one in sequences]
    verify = endless.verify_exact
    sequences[1] = sequence_of(endless, list(range(3, 12)), SamplingParams(max_new_tokens=300))
    most = exact_keys(sequences[1])

    def failing(cache, tokens, shape, keys):
        if keys == most and len(sequences[1].tokens) > 4:
            raise Refuses
        return verify(cache, tokens, shape, keys)

    monkeypatch.setattr(endless, "verify_exact", failing)
    decoder = Decoder(endless, size=3, drafter=drafter("lookup", endless), plan=DYNAMIC, exact=True)
    failed = until_done(decoder, *sequences)
    assert failed == [sequences[1]]
    assert [sequences[0].tokens, sequences[2].tokens] == [expected[0], expected[2]]


# prompts in pieces


def passes_of(target, monkeypatch) -> list[int]:
    """Tokens of each pass over prompts."""
    prefill, lengths = target.prefill, []

    def noted(ids, cache):
        lengths.append(ids.shape[1])
        return prefill(ids, cache)

    monkeypatch.setattr(target, "prefill", noted)
    return lengths


@pytest.mark.parametrize(("first", "keeping"), [("live", False), ("live", True), ("entering", True)])
def test_a_long_prompt_stalls_nobody_for_longer_than_a_piece(endless, monkeypatch, first, keeping):
    prefixes = PrefixCache(400) if keeping else None
    decoder = Decoder(endless, size=3, drafter=drafter("lookup", endless), plan=DYNAMIC, prefixes=prefixes, piece=16)
    short = sequence_of(endless, [5, 9], SamplingParams(max_new_tokens=60))
    long = sequence_of(endless, [3 + i % 40 for i in range(150)], SamplingParams(max_new_tokens=10))
    expected = [alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens)) for one in (short, long)]
    lengths = passes_of(endless, monkeypatch)
    decoder.enter([short, long] if first == "entering" else [short])
    if first == "live":
        decoder.step()
        decoder.enter([long])
    while not long.ended:
        before, count = sum(lengths), len(short.tokens)
        decoder.step()
        decoder.step()  # a piece and a pass, or the other way round
        if count and not short.ended:
            assert len(short.tokens) > count
        assert sum(lengths) - before <= 16 + (0 if count else 2)
    assert max(lengths) == 16
    until_done(decoder)
    assert [short.tokens, long.tokens] == expected


def test_a_prompt_alone_runs_at_once(endless, monkeypatch):
    lengths = passes_of(endless, monkeypatch)
    decoder = Decoder(endless, size=3, prefixes=PrefixCache(400), piece=16)
    until_done(decoder, sequence_of(endless, [3 + i % 40 for i in range(150)], SamplingParams(max_new_tokens=4)))
    assert lengths == [150]


def test_a_prompt_that_is_given_up_between_two_pieces_leaves_nothing(endless):
    decoder = Decoder(endless, size=2, piece=16)
    short = sequence_of(endless, [5, 9], SamplingParams(max_new_tokens=40))
    long = sequence_of(endless, [3 + i % 40 for i in range(150)], SamplingParams(max_new_tokens=10))
    decoder.enter([short])
    decoder.step()
    decoder.enter([long])
    decoder.step()
    decoder.step()
    assert long.cache is not None
    decoder.leave(long)
    assert decoder.free == 1
    assert long.cache is None
    after = sequence_of(endless, [7, 8], SamplingParams(max_new_tokens=10))
    until_done(decoder, after)
    for one in (short, after):
        assert one.tokens == alone(endless, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens))
