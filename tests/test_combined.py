"""A head and prompt lookup in one tree."""

from __future__ import annotations

import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from beagle.drafters.base import Draft, TreePlan
from beagle.drafters.combined import CombinedDrafter, merge
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.model import Model
from conftest import tiny_drafter, tiny_target
from drafting import One

LOOP = "w3 w4 w5 w6 w7 w8 w3 w4 w5 w6 w7 w8 w3 w4"


def paths(draft: Draft) -> dict[tuple[int, ...], float]:
    """Score of each candidate by the tokens from the root to it."""
    out: dict[tuple[int, ...], float] = {}
    known: list[tuple[int, ...]] = []
    for token, parent, score in zip(draft.tokens, draft.parents, draft.scores, strict=True):
        known.append((*(known[parent] if parent >= 0 else ()), token))
        out[known[-1]] = score
    assert len(out) == len(draft.tokens)
    return out


@st.composite
def drafts(draw: st.DrawFn) -> Draft:
    """Random trees, best first, no two children of a node alike."""
    tokens: list[int] = []
    parents: list[int] = []
    scores: list[float] = []
    for _ in range(draw(st.integers(0, 8))):
        parent = draw(st.integers(-1, len(tokens) - 1))
        token = draw(st.integers(0, 3))
        if (parent, token) in zip(parents, tokens, strict=True):
            continue
        tokens.append(token)
        parents.append(parent)
        scores.append((scores[parent] if parent >= 0 else 0.0) - draw(st.integers(0, 4)) / 4)
    return Draft(tokens, parents, scores)


@given(drafts(), drafts())
def test_merged_tree_holds_every_path_once_and_trusts_what_both_propose(one, other):
    alone = [paths(one), paths(other)]
    merged = merge(one, other, 64)
    found = paths(merged)
    assert set(found) == set(alone[0]) | set(alone[1])
    for path, score in found.items():
        # given that its parent is right, a candidate is wrong where all that propose it are
        wrong = [1 - math.exp(own[path] - own.get(path[:-1], 0.0)) for own in alone if path in own]
        assert math.exp(score - found.get(path[:-1], 0.0)) == pytest.approx(1 - math.prod(wrong), abs=1e-6)
        assert score >= max(own[path] for own in alone if path in own) - 1e-6
    assert merged.scores == sorted(merged.scores, reverse=True)
    assert all(parent < child for child, parent in enumerate(merged.parents))
    assert len(merge(one, other, 3).tokens) == min(3, len(found))


@pytest.mark.parametrize("sampling", [{}, {"temperature": 0.9, "seed": 4}], ids=str)
@pytest.mark.parametrize("kind", ["chain", "static", "dynamic"])
def test_answers_are_plain_decodings(kind, sampling):
    target = tiny_target()
    target.eos_ids = frozenset()
    model = Model(target, CombinedDrafter(tiny_drafter(target), LookupDrafter()), TreePlan(kind, 4, 5, 12))
    plain = model.generate(LOOP, max_new_tokens=60, draft=False, **sampling)
    fast = model.generate(LOOP, max_new_tokens=60, **sampling)
    assert fast.token_ids == plain.token_ids


def test_both_kinds_of_candidates_are_there_and_a_sure_repetition_needs_no_head(monkeypatch):
    target = tiny_target()
    head = tiny_drafter(target)
    drafter = CombinedDrafter(head, LookupDrafter())
    one = One(drafter)
    ids = [9, 8, 7, 9, 8, 6, 9]
    states = target.prefill(torch.tensor([ids]), target.new_cache(1, 64))[0]
    one.begin(ids, states)
    plan = TreePlan("dynamic", 3, 4, 64)
    both = paths(one.draft(8, plan))
    assert paths(drafter.lookup.draft([one.context.lookup], [8], plan)[0]).keys() <= both.keys()
    assert paths(head.draft([one.context.head], [8], plan)[0]).keys() <= both.keys()

    loop = [5, 6] * 12
    states = target.prefill(torch.tensor([loop]), target.new_cache(1, 64))[0]
    one.begin(loop, states)
    monkeypatch.setattr(head, "draft", lambda *_: pytest.fail("drafted"))
    assert one.draft(5, plan).tokens[:3] == [6, 5, 6]


def test_answers_take_turns():
    target = tiny_target()
    target.eos_ids = frozenset()
    for drafter in (CombinedDrafter(tiny_drafter(target), LookupDrafter()), SmallModelDrafter(target, tiny_target())):
        model = Model(target, drafter, TreePlan("dynamic", 4, 5, 12))
        prompts = [LOOP, "w9 w8 w9 w8 w9", "w30 w31"]
        alone = [model.generate(prompt, max_new_tokens=30) for prompt in prompts]
        streams = [model.stream(prompt, max_new_tokens=30) for prompt in prompts]
        ids: list[list[int]] = [[] for _ in prompts]
        for pieces in itertools.zip_longest(*streams):
            for own, piece in zip(ids, pieces, strict=True):
                own += piece.token_ids if piece else []
        assert ids == [answer.token_ids for answer in alone]
