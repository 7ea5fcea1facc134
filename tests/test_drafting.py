"""What the drafters of trained heads propose: well-formed trees, honest scores, no traces left behind."""

from __future__ import annotations

import math

import pytest
import torch
import torch.nn.functional as F

from beagle.drafters.base import NODE_GAIN_SHARE, STATIC_PATHS, Draft, TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.research.ablations import AblatedHead
from conftest import LIVELY, tiny_drafter, tiny_head, tiny_target
from drafting import One

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


HEADS = [
    {},
    {"architecture": "beagle-ablated", "concat": False},
    {"architecture": "beagle-ablated", "experts": 3},
    {"draft_vocab_size": 20},
    {"architecture": "eagle"},
    {"architecture": "eagle", "num_kv_heads": 2, "draft_vocab_size": 20},
]


@pytest.fixture(params=HEADS, ids=str)
def drafting(request):
    target = tiny_target()
    head = tiny_head(
        target, scale=LIVELY[request.param.get("architecture", "beagle").removesuffix("-ablated")], **request.param
    )
    if request.param.get("draft_vocab_size"):
        head.draft_vocab.copy_(torch.arange(20) * 3 + 1)
    drafter = One(HeadDrafter(target, head))
    states = target.prefill(torch.tensor([CONTEXT]), target.new_cache(1, 16))[0]
    drafter.begin(CONTEXT, states)
    return target, drafter, states


def test_half_precision_knows_distant_positions():
    """A head that is cast to bfloat16 must not cast the frequencies of its RoPE: they count positions."""
    target, far = tiny_target(), torch.arange(4000, 4004)
    head = tiny_head(target, rope_theta=100_000.0)
    exact = head.rotation(far, torch.float32)
    half = head.to(torch.bfloat16).rotation(far, torch.float32)
    assert all(torch.equal(one, other) for one, other in zip(half, exact, strict=True))


def beagle_states(target, head, states, tokens: list[int]):
    """Predicted states after each of ``tokens``, the root first: all keys anew every time, no cache."""
    newest, known, slots = states[-1:], states, torch.arange(len(states))
    for i, token in enumerate(tokens):
        slot = torch.tensor([len(states) - 1 + i])
        k, v = head.keys_values(known, head.rotation(slots, known.dtype))
        embedding = target.embed(torch.tensor([token]))
        q = head.queries(embedding, head.rotation(slot, known.dtype))
        newest = head.finish(head.attend(q[None], k[None], v[None], None)[0], embedding, newest)
        if not isinstance(head, AblatedHead) or head.config.concat:
            known, slots = torch.cat([known, newest]), torch.cat([slots, slot + 1])
        yield newest[0]


def eagle_states(target, head, states, tokens: list[int]):
    """The same for EAGLE: all features anew every time."""
    for i in range(len(tokens)):
        embeddings = target.embed(torch.tensor([*CONTEXT[1:], *tokens[: i + 1]]))
        x = head.features(embeddings, states)
        rotation = head.rotation(torch.arange(len(x)), x.dtype)
        k, v = head.keys_values(x, rotation)
        last = head.rotation(torch.tensor([len(x) - 1]), x.dtype)
        attended = head.attend(head.queries(x[-1:], last)[None], k[None], v[None], None)[0]
        states = torch.cat([states, head.finish(attended, x[-1:])])
        yield states[-1]


PREDICTED = {"beagle": beagle_states, "beagle-ablated": beagle_states, "eagle": eagle_states}


@torch.no_grad()
def score(target, drafter, states, path: list[int]) -> float:
    """Cumulative log-probability of drafting ``path`` after the root."""
    head, total = drafter.head, 0.0
    predicted = PREDICTED[head.architecture](target, head, states, [ROOT, *path[:-1]])
    for state, following in zip(predicted, path, strict=True):
        log_q = F.log_softmax(state @ drafter.lm_head.T, dim=-1)
        total += float(log_q[head.draft_vocab.tolist().index(following)])
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


@pytest.mark.parametrize("architecture", LIVELY)
def test_long_contexts_grow_the_cache(target, architecture):
    drafter = One(tiny_drafter(target, architecture=architecture, scale=LIVELY[architecture]))
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


@pytest.mark.parametrize("architecture", LIVELY)
def test_keys_are_made_when_a_draft_reads_them(target, monkeypatch, architecture):
    drafter = One(tiny_drafter(target, architecture=architecture, scale=LIVELY[architecture]))
    tokens = [3 + i for i in range(20)]
    states = target.prefill(torch.tensor([tokens]), target.new_cache(1, 20))[0]
    drafter.begin(tokens[:8], states[:8])
    made = []
    remember = drafter.head.remember
    monkeypatch.setattr(drafter.head, "remember", lambda own, *rest: made.append(own.tolist()) or remember(own, *rest))
    for at, end in ((8, 9), (9, 14), (14, 20)):
        drafter.extend(tokens[at:end], states[at:end])
    assert made == []
    drafter.draft(ROOT, PLANS[0])
    drafter.draft(ROOT, PLANS[0])
    assert made == [tokens[8:]]


def test_levels_that_gain_too_little_are_not_drafted(drafting):
    drafter, plan = drafting[1], TreePlan("dynamic", depth=5, top_k=4)
    assert set(drafter.draft(ROOT, plan, min_expected_tokens=1.0).parents) <= {-1}
    assert (
        drafter.drafter.draft([drafter.context] * 2, [ROOT, ROOT], plan, min_expected_tokens=1.1)
        == [Draft([], [], [])] * 2
    )


def test_candidates_without_hope_are_not_followed(drafting):
    drafter, plan = drafting[1], TreePlan("dynamic", depth=3, top_k=4)
    whole = drafter.draft(ROOT, plan)
    least = sorted(whole.scores)[len(whole.scores) // 3] - 1e-4
    draft = drafter.draft(ROOT, plan, min_expected_tokens=math.exp(least) / NODE_GAIN_SHARE)
    assert min(draft.scores) >= least
    assert set(paths(draft)) <= set(paths(whole))
    firsts = [whole.tokens[i] for i, parent in enumerate(whole.parents) if parent < 0 and whole.scores[i] >= least]
    assert [token for token, parent in zip(draft.tokens, draft.parents, strict=True) if parent < 0] == firsts


def paths(draft: Draft) -> list[tuple[int, ...]]:
    found: list[tuple[int, ...]] = []
    for token, parent in zip(draft.tokens, draft.parents, strict=True):
        found.append((*(found[parent] if parent >= 0 else ()), token))
    return found


@pytest.mark.parametrize("architecture", LIVELY)
def test_contexts_may_come_a_token_at_a_time(target, architecture):
    """The newest slot's key, where it needs the next token, is that of the accepted one, not the drafted."""
    drafter = One(tiny_drafter(target, architecture=architecture, scale=LIVELY[architecture]))
    states = target.prefill(torch.tensor([CONTEXT]), target.new_cache(1, 16))[0]
    drafter.begin(CONTEXT, states)
    at_once = drafter.draft(ROOT, PLANS[0])
    drafter.begin(CONTEXT[:1], states[:1])
    for i in range(1, len(CONTEXT)):
        drafter.draft(ROOT, PLANS[3])
        drafter.extend(CONTEXT[i : i + 1], states[i : i + 1])
    again = drafter.draft(ROOT, PLANS[0])
    assert again.tokens == at_once.tokens
    assert again.scores == pytest.approx(at_once.scores, abs=1e-4)


@pytest.mark.parametrize(
    ("head", "levels"),
    [
        ({}, [2, 3, 4, 5]),
        ({"architecture": "beagle-ablated", "concat": False}, []),
        ({"architecture": "eagle"}, [1, 2, 3, 4, 5]),
    ],
    ids=str,
)
def test_only_keys_that_a_later_query_sees_are_made(target, monkeypatch, head, levels):
    drafter = One(tiny_drafter(target, **head))
    states = target.prefill(torch.tensor([CONTEXT]), target.new_cache(1, 16))[0]
    drafter.begin(CONTEXT, states)
    made, level = [], drafter.head.level
    keys_values = drafter.head.keys_values

    def watched(x, rotation):
        made.append(len(seen))
        return keys_values(x, rotation)

    seen = []
    monkeypatch.setattr(drafter.head, "keys_values", watched)
    monkeypatch.setattr(drafter.head, "level", lambda *args: (seen.append(args), level(*args))[1])
    drafter.draft(ROOT, TreePlan("dynamic", depth=5, top_k=4))
    assert made == levels


@pytest.mark.parametrize("options", [{"depth": 0}, {"top_k": 0}, {"nodes": -1}], ids=str)
def test_empty_plans_are_refused(options):
    with pytest.raises(ValueError, match="at least 1"):
        TreePlan(**options)


def test_certain_tokens_stay_behind_their_parents():
    """Chances of almost 1, whose scores rounding must not put above their parents'."""
    target = tiny_target()
    drafter = One(tiny_drafter(target))
    drafter.begin(CONTEXT, target.prefill(torch.tensor([CONTEXT]), target.new_cache(1, 16))[0])

    def logits(states: torch.Tensor) -> torch.Tensor:
        """Level 1 in doubt, the others certain, all at a high level."""
        if len(states) == 1:
            return torch.linspace(0, 3, 64)[None] + 1000.3
        return torch.full((len(states), 64), 1000.3).index_fill_(1, torch.tensor([7]), 1040.3)

    drafter.eager.logits = logits
    draft = drafter.draft(ROOT, TreePlan("dynamic", depth=5, top_k=10))
    assert all(parent < node for node, parent in enumerate(draft.parents))
    assert all(parent < 0 or draft.scores[parent] >= draft.scores[node] for node, parent in enumerate(draft.parents))
