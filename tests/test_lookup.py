"""Prompt lookup: matches as a slow reference finds them, trees of several matches, lossless decoding."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import beagle
from beagle.drafters.base import TreePlan
from beagle.drafters.lookup import LookupDrafter
from beagle.model import Model
from conftest import tiny_model, tiny_target, tiny_tokenizer
from drafting import One

STATES = torch.zeros(0)  # never looked at
PROMPT = "w5 w9 w33 w12 w5 w9 w40 w5 w9"
KINDS = ["chain", "static", "dynamic"]


def begun(tokens: list[int], max_ngram: int = 4) -> One:
    drafter = One(LookupDrafter(max_ngram))
    drafter.begin(tokens, STATES)
    return drafter


def found(text: list[int], max_ngram: int) -> tuple[int, list[int]]:
    """The longest suffix that stands earlier in ``text``, and where what follows it starts, by scanning."""
    for n in range(min(max_ngram, len(text)), 0, -1):
        starts = [i + n for i in range(len(text) - n) if text[i : i + n] == text[-n:]]
        if starts:
            return n, starts
    return 0, []


def continued(text: list[int], start: int, depth: int) -> tuple[int, ...]:
    longer = list(text)
    for i in range(depth):
        longer.append(longer[start + i])
    return tuple(longer[len(text) :])


def paths_of(draft) -> list[tuple[int, ...]]:
    paths: list[tuple[int, ...]] = []
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        assert -1 <= parent < i  # so that every prefix is a tree
        paths.append((*(paths[parent] if parent >= 0 else ()), token))
    assert len(set(paths)) == len(paths)
    return paths


texts = st.lists(st.integers(0, 3), min_size=1, max_size=40)
ngrams = st.integers(1, 5)


@given(texts, st.integers(0, 3), ngrams, st.data())
def test_matches_are_those_of_a_scan(tokens, root, max_ngram, data):
    drafter = begun(tokens[:1], max_ngram)
    at = 1
    while at < len(tokens):
        size = data.draw(st.integers(1, len(tokens) - at))
        drafter.draft(tokens[at], TreePlan("chain"))  # leaves nothing behind
        drafter.extend(tokens[at : at + size], STATES)
        at += size
    assert drafter.matches(root) == found([*tokens, root], max_ngram)


@given(texts, st.integers(0, 3), ngrams, st.integers(1, 8))
def test_a_chain_continues_the_newest_longest_match(tokens, root, max_ngram, depth):
    draft = begun(tokens, max_ngram).draft(root, TreePlan("chain", depth=depth))
    starts = found([*tokens, root], max_ngram)[1]
    assert tuple(draft.tokens) == (continued([*tokens, root], starts[-1], depth) if starts else ())
    assert draft.parents == list(range(-1, len(draft.tokens) - 1))
    assert draft.scores == sorted(draft.scores, reverse=True)


@given(texts, st.integers(0, 3), st.integers(1, 5), st.integers(1, 4), st.none() | st.integers(1, 6))
def test_a_tree_merges_the_newest_matches(tokens, root, top_k, depth, nodes):
    draft = begun(tokens).draft(root, TreePlan("dynamic", depth, top_k, nodes))
    starts = found([*tokens, root], 4)[1][-top_k:]
    whole = {continued([*tokens, root], start, depth)[:n] for start in starts for n in range(1, depth + 1)}
    paths = paths_of(draft)
    assert len(paths) == min(nodes or 64, len(whole))
    assert set(paths) <= whole
    assert draft.scores == sorted(draft.scores, reverse=True)
    if starts and not nodes:  # chances of what follows a node never exceed the node's own
        for parent in range(-1, len(paths)):
            below = sum(math.exp(s) for s, p in zip(draft.scores, draft.parents, strict=True) if p == parent)
            assert below < (math.exp(draft.scores[parent]) if parent >= 0 else 1.0)


@given(texts, ngrams)
def test_scores_tell_how_often_such_matches_were_right(tokens, max_ngram):
    tries, hits = [0] * (max_ngram + 1), [0] * (max_ngram + 1)
    for i in range(1, len(tokens)):
        n, starts = found(tokens[:i], max_ngram)
        if starts:
            tries[n] += 1
            hits[n] += tokens[starts[-1]] == tokens[i]
    drafter = begun(tokens, max_ngram)
    for n in range(1, max_ngram + 1):
        assert drafter.hit_rate(n) == (hits[n] + n) / (tries[n] + n + 2)
    assert drafter.hit_rate(max_ngram + 3) == drafter.hit_rate(max_ngram)
    n, starts = found([*tokens, tokens[-1]], max_ngram)
    draft = drafter.draft(tokens[-1], TreePlan("chain", depth=3))
    expected = itertools.accumulate(math.log(drafter.hit_rate(n + i)) for i in range(3 if starts else 0))
    assert draft.scores == pytest.approx(list(expected))


def test_the_newer_match_stands_first():
    drafter = begun([7, 1, 20, 7, 2, 21, 7, 3, 22, 9])
    draft = drafter.draft(7, TreePlan("dynamic", depth=1, top_k=2))
    assert draft.tokens == [3, 2]
    assert drafter.draft(7, TreePlan("chain", depth=2)).tokens == [3, 22]
    assert drafter.draft(50, TreePlan()).tokens == []


def test_loops_go_on():
    assert begun([4, 5, 6]).draft(4, TreePlan("chain", depth=7)).tokens == [5, 6, 4, 5, 6, 4, 5]
    assert begun([4]).draft(4, TreePlan("chain", depth=3)).tokens == [4, 4, 4]


def test_a_new_context_forgets_the_last_one():
    drafter = begun([4, 5, 6, 4, 5])
    drafter.begin([30, 31], STATES)
    assert drafter.draft(4, TreePlan()).tokens == []
    assert drafter.hit_rate(1) == 1 / 3


def test_empty_ngrams_are_refused():
    with pytest.raises(ValueError, match="at least 1"):
        LookupDrafter(0)


@pytest.fixture(scope="module")
def looping():
    """A target whose greedy answer falls into a loop."""
    target = tiny_target(seed=3)
    target.eos_ids = frozenset()
    return target, Model(target).generate(PROMPT, max_new_tokens=60)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("nodes", [None, 6])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_plain_decoding(looping, kind, nodes, exact):
    target, plain = looping
    model = Model(target, LookupDrafter(), TreePlan(kind, depth=4, top_k=3, nodes=nodes))
    answer = model.generate(PROMPT, max_new_tokens=60, exact=exact)
    assert answer.token_ids == plain.token_ids
    if exact or nodes or kind != "dynamic":  # elsewhere the measured costs may say that drafts don't pay
        assert answer.stats.tau > 1.2
    stop = plain.text.split()[40]
    stopped = model.generate(PROMPT, max_new_tokens=60, exact=exact, stop=stop)
    assert stopped.text == plain.text.split(stop)[0]
    pieces = list(model.stream(PROMPT, max_new_tokens=60, exact=exact))
    assert "".join(piece.text for piece in pieces) == plain.text


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_answers_are_those_of_plain_decoding(looping, kind):
    target, _ = looping
    model = Model(target, LookupDrafter(), TreePlan(kind, depth=4, top_k=3, nodes=8))
    accepted = 0
    for seed in range(4):
        options = {"max_new_tokens": 40, "temperature": 0.7, "top_k": 5, "seed": seed}
        answer = model.generate(PROMPT, **options)
        assert answer.token_ids == Model(target).generate(PROMPT, **options).token_ids
        accepted += answer.stats.passed_tokens - answer.stats.passes
    assert accepted > 0


def test_loading_by_name(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    model = beagle.load(str(tmp_path), draft="lookup", dtype="float32", device="cpu")
    assert isinstance(model.drafter, LookupDrafter)
