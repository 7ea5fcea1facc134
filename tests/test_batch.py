"""Answers of a batch are those of one prompt at a time."""

from __future__ import annotations

import math
from collections import deque

import pytest
import torch

from beagle.decoding.costs import Costs
from beagle.decoding.decoder import Decoder
from beagle.decoding.sampling import Sampler
from beagle.decoding.sequence import Sequence
from beagle.drafters.base import Draft, TreePlan, prune
from beagle.drafters.combined import CombinedDrafter
from beagle.drafters.lookup import LookupDrafter
from beagle.drafters.small import SmallModelDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.shape import TreeShape
from conftest import FAMILIES, LIVELY, tiny_drafter, tiny_target

PROMPTS = ["w5 w9 w33", "w3 w4 w5 w6 w3 w4 w5 w6 w3 w4", "w7", "w40 w41 w40 w41 w40", "w11 " * 13, "w60 w3", "w8 w9"]
CHAIN, STATIC, DYNAMIC = (TreePlan(kind, depth=4, top_k=4, nodes=12) for kind in ("chain", "static", "dynamic"))


def drafter(kind: str, target):
    if kind == "head+lookup":
        return CombinedDrafter(tiny_drafter(target, scale=LIVELY["beagle"]), LookupDrafter())
    if kind == "small":
        return SmallModelDrafter(target, tiny_target())
    if kind == "lookup":
        return LookupDrafter()
    return tiny_drafter(target, architecture=kind, scale=LIVELY[kind]) if kind in LIVELY else None


def ending(family: str = "llama"):
    """Some answers end inside a draft, others at the limit."""
    target = tiny_target(family)
    target.eos_ids = frozenset({2, 17, 30, 41})
    return target


# families differ in the target's pass; kinds and plans in what it verifies; sampling in what is chosen
SAMPLING = {"temperature": 0.9, "top_k": 30, "top_p": 0.95, "seed": 5}
KINDS = [
    *[(family, "plain", None) for family in ("llama", "gemma3_text")],
    *[("llama", kind, plan) for kind in ("beagle", "eagle") for plan in (CHAIN, STATIC)],
    *[("gemma3_text", kind, DYNAMIC) for kind in ("eagle", "lookup", "head+lookup", "small")],
    ("llama", "head+lookup", CHAIN),
]
CASES = [
    *[(family, "beagle", DYNAMIC, {}) for family in FAMILIES],
    *[(*case, sampling) for case in KINDS for sampling in ({}, SAMPLING)],
]


@pytest.mark.slow
@pytest.mark.parametrize(("family", "kind", "plan", "sampling"), CASES)
def test_answers_are_those_of_one_prompt_at_a_time(family, kind, plan, sampling):
    target = tiny_target(family)
    model = Model(target, drafter(kind, target), plan)
    options = {"max_new_tokens": 20, **sampling}
    target.eos_ids = frozenset()
    target.eos_ids = frozenset({model.generate(PROMPTS[4], draft=False, **options).token_ids[11]})  # inside an answer
    alone = [model.generate(prompt, draft=False, **options) for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, rows=3, **options)
    assert [answer.token_ids for answer in together] == [answer.token_ids for answer in alone]
    assert [answer.text for answer in together] == [answer.text for answer in alone]
    assert len({len(answer.token_ids) for answer in alone}) > 1
    if plan:
        assert sum(answer.stats.drafted for answer in together) > 0
    for answer in together:
        assert answer.stats.tokens == len(answer.token_ids) == answer.stats.passed_tokens + 1


@pytest.mark.parametrize("kind", ["beagle", "eagle", "lookup", "head+lookup", "small"])
def test_a_row_verifies_the_trees_that_it_would_alone(kind):
    """So that tau is that of batch 1: any draft gives the right answer, but only the right one is fast."""
    target = tiny_target()
    target.eos_ids = frozenset()
    model = Model(target, drafter(kind, target), DYNAMIC)
    alone = [model.generate(prompt, max_new_tokens=30).stats for prompt in PROMPTS]
    together = [answer.stats for answer in model.generate_batch(PROMPTS, max_new_tokens=30)]
    assert [stats.accepted for stats in together] == [stats.accepted for stats in alone]
    if kind != "head+lookup":  # near the limit it asks the head a little more often than it would alone
        assert [stats.drafted for stats in together] == [stats.drafted for stats in alone]
    assert sum(stats.accepted_at.get(0, 0) for stats in alone) < sum(stats.passes for stats in alone)


@pytest.mark.parametrize("stopping", [False, True])
@pytest.mark.parametrize("plan", [CHAIN, STATIC, DYNAMIC], ids=str)
@pytest.mark.parametrize("kind", LIVELY)
def test_heads_draft_for_each_context_what_they_would_alone(kind, plan, stopping):
    target = tiny_target()
    one = drafter(kind, target)
    contexts = [[3 + (7 * i + j * j) % 50 for j in range(2 + 5 * i)] for i in range(4)]
    all_states = [target.prefill(torch.tensor([ids]), target.new_cache(1, 64))[0] for ids in contexts]

    def alone(min_expected_tokens: float) -> list[Draft]:
        drafts = []
        for ids, states in zip(contexts, all_states, strict=True):
            context = one.context()
            context.extend(ids, states)
            drafts += one.draft([context], [9], plan, min_expected_tokens)
        return drafts

    whole, min_expected_tokens = alone(0.0), 0.0
    if stopping:  # half of the contexts after a level
        first = [sum(math.exp(s) for s, p in zip(d.scores, d.parents, strict=True) if p < 0) for d in whole]
        min_expected_tokens = sum(sorted(first)[1:3]) / 2
    fresh = [one.context() for _ in contexts]
    for context, ids, states in zip(fresh, contexts, all_states, strict=True):
        context.extend(ids[:-1], states[:-1])
    for context, ids, states in zip(fresh, contexts, all_states, strict=True):
        context.extend(ids[-1:], states[-1:])
    together, single = one.draft(fresh, [9] * 4, plan, min_expected_tokens), alone(min_expected_tokens)
    for draft, own in zip(together, single, strict=True):
        assert (draft.tokens, draft.parents) == (own.tokens, own.parents)
        assert draft.scores == pytest.approx(own.scores, abs=1e-4)
    stopped = sum(max(draft.parents) < 0 for draft in together)
    assert stopped >= 2 if stopping else stopped == 0  # or nothing below the first level was worth a row


@pytest.mark.parametrize("rows", [1, 2, 7, 50])
def test_any_number_of_rows_serves_any_number_of_prompts(rows):
    target = ending()
    model = Model(target, drafter("head+lookup", target), DYNAMIC)
    alone = [model.generate(prompt, max_new_tokens=12).token_ids for prompt in PROMPTS]
    assert [a.token_ids for a in model.generate_batch(PROMPTS, rows=rows, max_new_tokens=12)] == alone
    assert model.generate_batch([], rows=rows) == []


def test_trees_sized_by_costs_share_one_pass():
    target = ending()
    model = Model(target, drafter("head+lookup", target))
    model.costs = lambda exact=False, batch=False: Costs([0.01 + 0.001 * n for n in range(65)], 0.001, 5)
    alone = [model.generate(prompt, max_new_tokens=20).token_ids for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, rows=4, max_new_tokens=20)
    assert [answer.token_ids for answer in together] == alone
    assert sum(answer.stats.drafted for answer in together) > 0


def test_the_likeliest_candidates_of_all_rows_are_verified():
    drafts = [Draft([4, 5, 6], [-1, 0, 1], [-0.1, -0.2, -9.0]), Draft([7, 8], [-1, -1], [-0.7, -8.0])]
    dear = Costs([1.0] * 3 + [1.0 + 0.15 * n for n in range(1, 20)], 0.0, 5)
    assert [draft.tokens for draft in dear.share(drafts, 2)] == [[4, 5], [7]]
    assert [draft.tokens for draft in Costs([1.0] * 20, 0.0, 5).share(drafts, 2)] == [[4, 5, 6], [7, 8]]
    dearer = Costs([float(n) for n in range(20)], 0.0, 5)
    assert [draft.tokens for draft in dearer.share(drafts, 2)] == [[], []]


def test_costs_go_on_beyond_what_was_measured():
    rising = Costs([float(n) for n in range(9)], 10.0, 5)
    free = Costs([1.0] * 9, 0.0, 5)
    scores = [-0.01] * 20
    assert free.best_tree_size(scores, 10) == 20  # more rows than the 8 measured
    assert rising.best_tree_size([-9.0] * 20, 10) == 0


def test_drafts_are_cut_at_a_depth():
    draft = Draft([4, 5, 6, 7], [-1, 0, -1, 1], [-0.1, -0.2, -0.3, -0.4])
    assert prune(draft, 3, 9) == draft
    assert prune(draft, 2, 9) == Draft([4, 5, 6], [-1, 0, -1], [-0.1, -0.2, -0.3])
    assert prune(draft, 1, 9) == Draft([4, 6], [-1, -1], [-0.1, -0.3])
    assert prune(draft, 3, 2) == Draft([4, 5], [-1, 0], [-0.1, -0.2])
    assert prune(Draft([], [], []), 3, 2) == Draft([], [], [])


@pytest.mark.parametrize("limit", [1, 2, 5])
def test_limits_and_the_context_are_met(limit):
    target = tiny_target(max_position_embeddings=24)
    target.eos_ids = frozenset()
    model = Model(target, drafter("beagle", target), DYNAMIC)
    prompts = [[3 + i % 40 for i in range(n)] for n in (4, 21, 23)]
    answers = model.generate_batch(prompts, max_new_tokens=limit)
    assert [len(answer.token_ids) for answer in answers] == [min(limit, room) for room in (20, 3, 1)]
    assert [a.token_ids for a in answers] == [model.generate(p, max_new_tokens=limit).token_ids for p in prompts]


def test_a_prompt_that_does_not_fit_is_named():
    target = tiny_target(max_position_embeddings=24)
    with pytest.raises(BeagleError, match=r"prompt 2 of 3 has 30 tokens.*24.*shorten"):
        Model(target).generate_batch([[3], [4] * 30, [5]])


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"rows": 0}, "rows"),
        ({"seed": [1]}, "seeds"),
        ({"stop": ""}, "stop string"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"temperature": -1.0}, "temperature"),
    ],
)
def test_bad_requests_are_refused(target, options, word):
    with pytest.raises(BeagleError, match=word):
        Model(target).generate_batch(["w3", "w4"], **options)


def test_each_prompt_may_have_its_own_seed(target):
    model = Model(target, drafter("lookup", target), DYNAMIC)
    options = {"max_new_tokens": 10, "temperature": 1.2}
    answers = model.generate_batch(["w5 w9"] * 3, seed=[0, 1, 0], **options)
    alone = [model.generate("w5 w9", seed=seed, **options).token_ids for seed in (0, 1, 0)]
    assert [answer.token_ids for answer in answers] == alone
    assert alone[0] != alone[1]


def test_stop_strings_end_a_row_and_let_the_next_one_in():
    target = ending()
    model = Model(target, drafter("head+lookup", target), DYNAMIC)
    words = [model.generate(prompt, max_new_tokens=16).text.split() for prompt in PROMPTS]
    stop = [max(words, key=len)[2], max(words, key=len)[5]]
    alone = [model.generate(prompt, max_new_tokens=16, stop=stop) for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, rows=2, max_new_tokens=16, stop=stop)
    assert [(a.text, a.token_ids, a.stats.tokens) for a in together] == [
        (a.text, a.token_ids, a.stats.tokens) for a in alone
    ]
    assert any(len(a.text.split()) < len(own) for a, own in zip(alone, words, strict=True))


@pytest.mark.parametrize("family", ["llama", "gemma3_text"])
def test_kept_states_are_true_ones(family):
    target = ending(family)
    for kind in ("plain", "beagle"):
        decoder = Decoder(target, size=2, drafter=drafter(kind, target), plan=DYNAMIC, keep_states=True)
        rows = [Sequence(list(range(3, 3 + n)), 15, Sampler()) for n in (4, 9, 2, 5)]
        for _ in decoder.run(deque(rows)):
            pass
        for row in rows:
            ids = torch.tensor([[*row.ids, *row.tokens[:-1]]])
            fresh = target.prefill(ids, target.new_cache(1, 64))[0]
            torch.testing.assert_close(torch.cat(row.states), fresh, atol=1e-4, rtol=1e-4)


def test_times_of_all_answers_add_up_to_the_runs(target, monkeypatch):
    ticks = iter(range(10**6))
    monkeypatch.setattr("beagle.decoding.decoder.time.perf_counter", lambda: float(next(ticks)))
    answers = Model(target, drafter("lookup", target), DYNAMIC).generate_batch(PROMPTS, rows=3, max_new_tokens=8)
    read = next(ticks)
    passes = sum(answer.stats.prefill_seconds for answer in answers)
    total = sum(answer.stats.prefill_seconds + answer.stats.decode_seconds for answer in answers)
    steps = (total - passes) / 3  # four readings of the clock, one second apart, make a step
    assert total == pytest.approx(passes + 3 * round(steps))
    assert read == pytest.approx(2 * passes + 4 * steps)


@pytest.mark.parametrize("family", FAMILIES)
def test_ragged_passes_are_those_of_single_rows(family):
    target = tiny_target(family)
    prompts = [list(range(3, 3 + n)) for n in (9, 2, 14)]
    shapes = [TreeShape([-1, 0, 0, 1]), TreeShape([-1]), TreeShape([-1, 0, 0, 1, 2, 2, 4])]
    cache = target.new_cache(5, 24)
    cache.lengths = [0] * 5
    flat = torch.tensor([token for ids in prompts for token in ids])
    prefilled = target.verify_trees(cache, flat, [TreeShape.chain(len(ids)) for ids in prompts], first=1)
    cache.lengths[1:4] = map(len, prompts)
    trees = [torch.arange(20, 20 + len(shape.parents)) for shape in shapes]
    at_once = target.verify_trees(cache, torch.cat(trees), shapes, first=1).split([len(t) for t in trees])
    for ids, shape, tree, states, prompt_states in zip(
        prompts, shapes, trees, at_once, prefilled.split([len(ids) for ids in prompts]), strict=True
    ):
        own = target.new_cache(1, 24)
        alone = target.prefill(torch.tensor([ids]), own)[0]
        torch.testing.assert_close(prompt_states, alone, atol=1e-4, rtol=1e-4)
        torch.testing.assert_close(states, target.verify(own, tree, shape), atol=1e-4, rtol=1e-4)
