"""Kept keys of ended answers: the next prompt that begins so runs only what is new, and its answer is the same."""

from __future__ import annotations

import gc
import random
import sys
import weakref
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from beagle.decoding.decoder import Decoder
from beagle.decoding.prefixes import PrefixCache
from beagle.decoding.sampling_params import SamplingParams
from beagle.drafters.lookup import LookupDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.captured import Captured
from conftest import FAMILIES, Recorder, tiny_target
from test_decoder import DYNAMIC, alone, drafter, limited, passes_of, sequence_of, until_done

PROMPT = [3 + i * i % 40 for i in range(25)]


def keep(prefixes: PrefixCache, target, ids: list[int]) -> None:
    cache = target.new_cache(2, len(ids) + 3)
    states = target.verify_trees(cache, torch.tensor(ids), [chain(len(ids))], 1)
    cache.lengths[1] = len(ids)
    prefixes.keep(ids, cache, 1, [states])


def chain(n: int):
    from beagle.targets.shape import TreeShape

    return TreeShape.chain(n)


def dialogue(model: Model, turns: int = 3) -> list[tuple[list[int], list[int]]]:
    """Prompts and answers; each prompt goes on where the last answer ended."""
    ids, found = list(PROMPT), []
    for turn in range(turns):
        answer = model.generate(ids, max_new_tokens=12).token_ids
        found.append((list(ids), answer))
        ids += [*answer, 7, 9 + turn, 11]
    return found


@pytest.mark.parametrize(
    ("family", "name"),
    [
        *[(family, "beagle") for family in FAMILIES],
        *[("llama", name) for name in ("plain", "eagle", "lookup", "head+lookup", "small")],
    ],
)
def test_each_turn_runs_what_is_new_and_drafts_as_before(family, name, monkeypatch):
    target = tiny_target(family)
    target.eos_ids = frozenset()
    fresh = Model(target, drafter(name, target), DYNAMIC)
    kept = Model(target, drafter(name, target), DYNAMIC, prefix_cache=500)
    expected = dialogue(fresh)
    lengths = passes_of(target, monkeypatch)
    assert dialogue(kept) == expected
    # all but the answer's last token, which was never run, and the three new ones
    assert lengths == [len(PROMPT), 4, 4]
    for prompt, _ in expected:
        drafted, alone_drafted = kept.generate(prompt, max_new_tokens=12), fresh.generate(prompt, max_new_tokens=12)
        assert drafted.token_ids == alone_drafted.token_ids
        assert drafted.stats.accepted == alone_drafted.stats.accepted
        assert drafted.stats.drafted == alone_drafted.stats.drafted


def test_what_is_kept_is_a_copy():
    """Later sequences write over the room that a kept one had, and go on from the copy without harm to it."""
    target = tiny_target()
    target.eos_ids = frozenset()
    prefixes = PrefixCache(1000)
    decoder = Decoder(target, size=3, drafter=LookupDrafter(), plan=DYNAMIC, prefixes=prefixes)
    until_done(decoder, sequence_of(target, PROMPT, SamplingParams(max_new_tokens=20)))
    kept = prefixes.find([*PROMPT, 5])
    assert kept is not None
    assert kept.length == len(PROMPT)
    whole = prefixes._kept[-1]
    stacks = {shape: stack.clone() for shape, stack in whole.cache._stacks.items()}
    states = whole.states.clone()
    rng = random.Random(0)
    more = [
        sequence_of(target, [*PROMPT[: 5 * i + 5], *rng.choices(range(3, 64), k=6)], SamplingParams(max_new_tokens=15))
        for i in range(3)
    ]
    until_done(decoder, *more)
    assert [one.cached_tokens for one in more] == [5, 10, 15]
    for shape, stack in stacks.items():
        assert torch.equal(whole.cache._stacks[shape], stack)
    assert torch.equal(whole.states, states)
    for one in more:
        assert one.tokens == alone(target, one.ids, SamplingParams(max_new_tokens=15))


def test_no_more_is_kept_than_was_asked_for():
    target = tiny_target()
    rng = random.Random(1)
    prefixes = PrefixCache(60)
    for _ in range(200):
        ids = [*PROMPT[: rng.randrange(20)], *rng.choices(range(3, 9), k=rng.randrange(1, 70))]
        keep(prefixes, target, ids)
        held = sum(next(iter(one.cache._stacks.values())).shape[3] for one in prefixes._kept)
        assert prefixes.tokens == held == sum(len(one.states) for one in prefixes._kept) <= 60
        found = prefixes.find([*ids, 4])
        assert found is not None
        assert found.length == len(found.states) >= min(60, len(ids))
        for one in prefixes._kept:
            for stack in one.cache._stacks.values():
                assert stack.untyped_storage().nbytes() == stack.numel() * stack.element_size()


def test_the_least_recently_used_goes_first():
    target = tiny_target()
    prefixes = PrefixCache(30)
    keep(prefixes, target, [5] * 10)
    keep(prefixes, target, [6] * 10)
    keep(prefixes, target, [7] * 10)
    assert prefixes.find([5] * 4) is not None
    keep(prefixes, target, [8] * 10)
    assert prefixes.find([6] * 10) is None
    assert prefixes.find([5] * 10).length == 9  # of a prompt's last token the logits are needed
    assert prefixes.find([5]) is None
    keep(prefixes, target, [5] * 12)  # what it begins with is no longer kept by itself
    assert prefixes.tokens == 22


def test_threads_share_what_is_kept():
    target = tiny_target()
    prefixes = PrefixCache(40)
    interval = sys.getswitchinterval()

    def work(seed: int) -> None:
        rng = random.Random(seed)
        for _ in range(150):
            ids = rng.choices(range(3, 6), k=12)
            keep(prefixes, target, ids)
            found = prefixes.find([*ids, 4])
            assert found is None or found.tokens.tolist() == ids[: found.length]

    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(4) as pool:
            list(pool.map(work, range(4)))
    finally:
        sys.setswitchinterval(interval)
    assert prefixes.tokens <= 40


def test_no_memory_to_keep_a_sequence_harms_nobody(monkeypatch):
    target = tiny_target()
    target.eos_ids = frozenset()
    prefixes = PrefixCache(400)
    decoder = Decoder(target, size=2, drafter=LookupDrafter(), plan=DYNAMIC, prefixes=prefixes)
    sequences = [sequence_of(target, PROMPT[:n], SamplingParams(max_new_tokens=9 + n)) for n in (4, 9)]
    cat = torch.cat

    def full(tensors, *rest, **options):
        if any(one.ended for one in sequences) and len(tensors) and tensors[0].shape[-1:] == (32,):
            raise RuntimeError("not enough memory")
        return cat(tensors, *rest, **options)

    monkeypatch.setattr(torch, "cat", full)
    assert until_done(decoder, *sequences) == []
    monkeypatch.undo()
    assert prefixes.tokens == 0
    for one in sequences:
        assert one.tokens == alone(target, one.ids, SamplingParams(max_new_tokens=one.max_new_tokens))


def test_nothing_is_kept_of_a_sequence_that_failed():
    target = tiny_target()
    prefixes = PrefixCache(400)
    decoder = Decoder(target, prefixes=prefixes)
    until_done(decoder, sequence_of(target, PROMPT, SamplingParams(max_new_tokens=9), watch=lambda step: 1 / 0))
    assert prefixes.tokens == 0


@pytest.mark.parametrize("at", ["extend", "compact"])
def test_nothing_is_kept_of_a_step_that_was_interrupted(at, monkeypatch):
    """Ctrl-C in a notebook: what of the step is in the cache, nobody knows."""
    target = tiny_target()
    target.eos_ids = frozenset()
    model = Model(target, LookupDrafter(), DYNAMIC, prefix_cache=400)
    expected = alone(target, PROMPT, SamplingParams(max_new_tokens=30))
    stream = model.stream(PROMPT, max_new_tokens=30)
    for _ in range(3):
        next(stream)

    def interrupt(*arguments):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        if at == "extend":
            patch.setattr("beagle.drafters.lookup.LookupContext.extend", interrupt)
        else:  # amid the moves
            patch.setattr("beagle.targets.cache.KVCache.compact_sequences", half_done)
        with pytest.raises(KeyboardInterrupt):
            next(stream)
    assert model.prefixes.tokens == 0
    for _ in range(2):
        assert model.generate(PROMPT, max_new_tokens=30).token_ids == expected


def half_done(cache, kept):
    for row, path in enumerate(kept):
        cache.lengths[row] += len(path)
    raise KeyboardInterrupt


def test_a_stream_that_is_closed_is_kept():
    target = tiny_target()
    target.eos_ids = frozenset()
    model = Model(target, LookupDrafter(), DYNAMIC, prefix_cache=400)
    stream = model.stream(PROMPT, max_new_tokens=30)
    next(stream)
    next(stream)
    stream.close()
    assert model.prefixes.tokens > len(PROMPT)
    expected = alone(target, PROMPT, SamplingParams(max_new_tokens=30))
    assert model.generate(PROMPT, max_new_tokens=30).token_ids == expected


def test_keys_of_a_failed_answer_are_let_go_with_its_error(monkeypatch):
    """Whoever catches it may ask for less at once: memory may be what was missing."""
    target = tiny_target()
    caches, new_cache = [], target.new_cache

    def noted(*arguments):
        cache = new_cache(*arguments)
        caches.append(weakref.ref(cache))
        return cache

    def fail(states):
        raise BeagleError("no memory")

    monkeypatch.setattr(target, "new_cache", noted)
    monkeypatch.setattr(target, "logits", fail)
    gc.collect()
    gc.disable()
    try:
        with pytest.raises(BeagleError) as caught:
            Model(target, LookupDrafter(), DYNAMIC).generate(PROMPT, max_new_tokens=5)
        del caught
        assert [cache() for cache in caches] == [None]
    finally:
        gc.enable()


def test_a_kept_prefix_that_finds_no_memory_ends_its_sequence_alone(monkeypatch):
    target = tiny_target()
    prefixes = PrefixCache(400)
    decoder = Decoder(target, size=2, prefixes=prefixes)
    until_done(decoder, sequence_of(target, PROMPT, SamplingParams(max_new_tokens=3)))
    one = sequence_of(target, PROMPT, SamplingParams(max_new_tokens=3))
    with monkeypatch.context() as patch:
        limited(target, patch, 20)
        assert until_done(decoder, one) == [one]
    again = sequence_of(target, PROMPT, SamplingParams(max_new_tokens=3))
    assert until_done(decoder, again) == []
    assert again.tokens == alone(target, PROMPT, SamplingParams(max_new_tokens=3))


def test_exact_answers_take_nothing_that_is_kept():
    target = tiny_target(dtype=torch.bfloat16)
    target.eos_ids = frozenset()
    model = Model(target, LookupDrafter(), DYNAMIC, prefix_cache=400)
    model.generate(PROMPT, max_new_tokens=10)
    kept = model.prefixes.tokens
    exact = Model(target).generate(PROMPT, max_new_tokens=40, exact=True).token_ids
    assert model.generate(PROMPT, max_new_tokens=40, exact=True).token_ids == exact
    assert model.prefixes.tokens == kept


def test_memory_of_captured_graphs_is_lent_again():
    """What is kept is copied out of a graph's memory, which the next answer overwrites."""
    target = tiny_target()
    target.eos_ids = frozenset()
    expected = dialogue(Model(target, LookupDrafter(), DYNAMIC))
    fast = tiny_target()
    fast.eos_ids = frozenset()
    captured = Captured(fast.base, fast.hidden_size, fast.layers, Recorder())
    fast.use(captured)
    model = Model(fast, LookupDrafter(), DYNAMIC, prefix_cache=500)
    assert dialogue(model) == expected
    model.generate([9] * 40, max_new_tokens=20)
    assert [model.generate(ids, max_new_tokens=12).token_ids for ids, _ in expected] == [a for _, a in expected]
    assert len(captured._rooms) == 1
    decoder = model.decoder(3, prefixes=model.prefixes)
    sequences = [sequence_of(fast, ids, SamplingParams(max_new_tokens=12)) for ids, _ in expected]
    for one in sequences:
        decoder.enter([one])
        decoder.step()
    assert until_done(decoder) == []
    assert [one.tokens for one in sequences] == [a for _, a in expected]
    assert all(room.tenant() is None for room in captured._rooms)
