"""What the Beagle drafter proposes: well-formed trees, honest scores, no traces left behind."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from beagle.drafters.base import STATIC_PATHS, TreePlan
from beagle.drafters.beagle import BeagleDrafter
from conftest import tiny_drafter, tiny_head, tiny_target

CONTEXT = [5, 9, 33, 12, 60, 41, 7]
ROOT = 20
PLANS = [
    TreePlan("chain", depth=5),
    TreePlan("static", depth=5, top_k=10),
    TreePlan("static", depth=2, top_k=3),
    TreePlan("dynamic", depth=4, top_k=5, nodes=20),
    TreePlan("dynamic", depth=3, top_k=3, nodes=2),
    TreePlan("dynamic", depth=5, top_k=10),
]


@pytest.fixture(params=[{}, {"concat": False}, {"draft_vocab_size": 20}], ids=str)
def drafting(request):
    target = tiny_target()
    head = tiny_head(target, scale=15.0, **request.param)
    if request.param.get("draft_vocab_size"):
        head.draft_vocab.copy_(torch.arange(20) * 3 + 1)
    drafter = BeagleDrafter(target, head)
    states = target.prefill(torch.tensor([CONTEXT]), target.new_cache(1, 16))[0]
    drafter.begin(CONTEXT, states)
    return target, drafter, states


@torch.no_grad()
def score(target, drafter, states, path: list[int]) -> float:
    """Cumulative log-probability of drafting ``path`` after the root, path by path, no cache."""
    head, concat = drafter.head, drafter.head.config.concat
    total, newest = 0.0, states[-1:]
    known, slots = states, torch.arange(len(states))
    for i, (token, following) in enumerate(zip([ROOT, *path], path, strict=False)):
        slot = torch.tensor([len(states) - 1 + i])
        k, v = head.keys_values(known, head.rotation(slots, known.dtype))
        embedding = target.embed(torch.tensor([token]))
        attended = head.attend(head.queries(embedding, head.rotation(slot, known.dtype))[None], k[None], v[None], None)[
            0
        ]
        newest = head.finish(attended, embedding, newest)
        if concat:
            known, slots = torch.cat([known, newest]), torch.cat([slots, slot + 1])
        log_q = F.log_softmax(newest[0] @ drafter.lm_head.T, dim=-1)
        total += float(log_q[drafter.head.draft_vocab.tolist().index(following)])
    return total


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_trees_are_well_formed_and_scores_honest(drafting, plan):
    target, drafter, states = drafting
    draft = drafter.draft(ROOT, plan)
    assert len(draft.tokens) == len(draft.parents) == len(draft.scores) > 0
    paths: list[list[int]] = []
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        assert -1 <= parent < i  # so that every prefix is a tree
        paths.append([*(paths[parent] if parent >= 0 else []), token])
        assert draft.scores[i] == pytest.approx(score(target, drafter, states, paths[-1]), abs=1e-3)
    assert len({tuple(p) for p in paths}) == len(paths)
    assert max(map(len, paths)) <= plan.depth
    if plan.kind == "chain":
        assert draft.parents == list(range(-1, plan.depth - 1))
    elif plan.kind == "static":
        wanted = [p for p in STATIC_PATHS if len(p) <= plan.depth and max(p) < plan.top_k]
        assert len(paths) == len(wanted)
    else:
        assert len(paths) == min(plan.nodes or 64, len(paths))
        assert draft.scores == sorted(draft.scores, reverse=True)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_drafting_leaves_nothing_behind(drafting, plan):
    target, drafter, _ = drafting
    first = drafter.draft(ROOT, plan)
    assert drafter.draft(ROOT, plan) == first
    longer = [*CONTEXT, ROOT, first.tokens[0]]
    states = target.prefill(torch.tensor([longer]), target.new_cache(1, 16))[0]
    drafter.extend(longer[len(CONTEXT) :], states[len(CONTEXT) :])
    extended = drafter.draft(30, plan)
    drafter.begin(longer, states)
    fresh = drafter.draft(30, plan)
    assert (extended.tokens, extended.parents) == (fresh.tokens, fresh.parents)
    assert extended.scores == pytest.approx(fresh.scores, abs=1e-4)


def test_long_contexts_grow_the_cache(target):
    drafter = tiny_drafter(target, scale=15.0)
    tokens = [3 + i % 50 for i in range(505)]
    states = target.prefill(torch.tensor([tokens]), target.new_cache(1, 505))[0]
    drafter.begin(tokens, states)
    plan = TreePlan("dynamic", depth=5, top_k=10)
    at_once = drafter.draft(ROOT, plan)
    drafter.begin(tokens[:10], states[:10])
    drafter.draft(ROOT, plan)
    for at in range(10, 505, 45):
        drafter.extend(tokens[at : at + 45], states[at : at + 45])
    piecewise = drafter.draft(ROOT, plan)
    assert piecewise.tokens == at_once.tokens
    assert piecewise.scores == pytest.approx(at_once.scores, abs=1e-4)


def test_levels_that_gain_too_little_are_not_drafted(drafting):
    drafter = drafting[1]
    draft = drafter.draft(ROOT, TreePlan("dynamic", depth=5, top_k=4), min_gain=2.0)
    assert draft.parents == [-1] * 4


@pytest.mark.parametrize("options", [{"depth": 0}, {"top_k": 0}, {"nodes": -1}], ids=str)
def test_empty_plans_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        TreePlan(**options)
