"""A small model as the drafter: honest trees, a cache of true tokens only, lossless decoding."""

from __future__ import annotations

import itertools
import random

import pytest
import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModelForCausalLM

import beagle
from beagle.drafters.base import STATIC_PATHS, TreePlan
from beagle.drafters.small import SmallModelDrafter
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.shape import TreeShape
from beagle.targets.target import Target
from conftest import tiny_model, tiny_target, tiny_tokenizer
from drafting import One

CONTEXT = [5, 9, 33, 12, 60, 41, 7]
ROOT = 20
PROMPT = "w5 w9 w33 w12"
KINDS = ["chain", "static", "dynamic"]
STATES = torch.zeros(0)  # never looked at
PLANS = [
    TreePlan("chain", depth=5),
    TreePlan("static", depth=5, top_k=10),
    TreePlan("static", depth=2, top_k=3),
    TreePlan("dynamic", depth=4, top_k=5, nodes=20),
    TreePlan("dynamic", depth=3, top_k=3, nodes=2),
    TreePlan("dynamic", depth=5, top_k=10),
]


def endless(family: str = "llama", **options) -> Target:
    target = tiny_target(family, **options)
    target.eos_ids = frozenset()
    return target


def small_model(family: str = "llama", **options) -> Target:
    return tiny_target(family, **{"seed": 1, "hidden_size": 16, **options})


@pytest.fixture(scope="module")
def target() -> Target:
    return endless()


@pytest.fixture(scope="module")
def plain(target) -> list[int]:
    return Model(target).generate(PROMPT, max_new_tokens=24).token_ids


def next_log_q(small: Target, ids: list[int]) -> torch.Tensor:
    states = small.prefill(torch.tensor([ids]), small.new_cache(1, len(ids)))[0]
    return F.log_softmax(small.logits(states[-1]).float(), dim=-1)


def check_cache(drafter: One, context: list[int]) -> None:
    """Its cache and what is pending are the context, and the cache is as a fresh prefill leaves it."""
    n = drafter.cache.length
    assert drafter.pending == context[n:]
    fresh = drafter.small.new_cache(1, len(context))
    drafter.small.prefill(torch.tensor([context]), fresh)
    for ours, theirs in zip(drafter.cache.tensors, fresh.tensors, strict=True):
        torch.testing.assert_close(ours[:, :, :n], theirs[:, :, :n], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text", "gpt_neox"])
def test_a_tree_grown_by_levels_is_the_tree_at_once(family):
    model = tiny_target(family)
    parents = [-1, 0, 0, 1, 1, 2, 3, 5, 5]
    tokens = torch.tensor([20, 7, 8, 9, 10, 11, 12, 13, 14])
    states = []
    for levels in ((0, 9), (0, 1, 3, 6, 9)):
        cache = model.new_cache(1, 32)
        model.prefill(torch.tensor([CONTEXT]), cache)
        parts = [model.verify(cache, tokens[a:b], TreeShape(parents[:b]), a) for a, b in itertools.pairwise(levels)]
        states.append(torch.cat(parts))
    torch.testing.assert_close(states[0], states[1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("plan", PLANS, ids=str)
def test_trees_are_well_formed_and_scores_honest(target, plan):
    small = small_model()
    drafter = One(SmallModelDrafter(target, small))
    drafter.begin(CONTEXT, STATES)
    draft = drafter.draft(ROOT, plan)
    paths: list[tuple[int, ...]] = []
    for i, (token, parent) in enumerate(zip(draft.tokens, draft.parents, strict=True)):
        assert -1 <= parent < i  # so that every prefix is a tree
        above = paths[parent] if parent >= 0 else ()
        score = draft.scores[parent] if parent >= 0 else 0.0
        expected = score + float(next_log_q(small, [*CONTEXT, ROOT, *above])[token])
        assert draft.scores[i] == pytest.approx(expected, abs=1e-3)
        paths.append((*above, token))
    assert len(set(paths)) == len(paths) > 0
    assert max(map(len, paths)) <= plan.depth
    if plan.kind == "chain":
        assert draft.parents == list(range(-1, plan.depth - 1))
    elif plan.kind == "static":
        assert len(paths) == len([p for p in STATIC_PATHS if len(p) <= plan.depth and max(p) < plan.top_k])
    else:
        assert len(paths) == (plan.nodes or 64)
        assert draft.scores == sorted(draft.scores, reverse=True)
        assert draft.tokens[0] == int(next_log_q(small, [*CONTEXT, ROOT]).argmax())
    assert drafter.draft(ROOT, plan) == draft  # nothing is left behind
    check_cache(drafter, CONTEXT)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("family", ["llama", "mistral", "gemma3_text"])
def test_the_cache_holds_the_true_context_whatever_is_accepted(target, family, seed):
    pick = random.Random(seed)
    small = small_model(family)
    drafter = One(SmallModelDrafter(target, small))
    context = list(CONTEXT)
    drafter.begin(context, STATES)
    for _ in range(12):
        root = pick.randrange(3, 64)
        accepted: list[int] = []
        if pick.random() < 0.8:
            if pick.random() < 0.3:
                drafter.draft(pick.randrange(3, 64), pick.choice(PLANS))  # for another root, in vain
            draft = drafter.draft(root, pick.choice(PLANS))
            node = -1
            while (below := [i for i, p in enumerate(draft.parents) if p == node]) and pick.random() < 0.8:
                node = pick.choice(below)
                accepted.append(draft.tokens[node])
        else:  # the loop doesn't draft where one token is left
            accepted = [pick.randrange(3, 64) for _ in range(pick.randrange(3))]
        context += [root, *accepted]
        drafter.extend([root, *accepted], STATES)
        check_cache(drafter, context)
    draft = drafter.draft(ROOT, TreePlan("dynamic", depth=1, top_k=5))
    best = next_log_q(small, [*context, ROOT]).topk(5)
    assert draft.tokens == best.indices.tolist()
    assert draft.scores == pytest.approx(best.values.tolist(), abs=1e-3)
    assert drafter.pending == []


def test_nodes_of_an_earlier_draft_are_not_taken_for_new_ones(target):
    """The same tokens once more, with no draft in between."""
    drafter = One(SmallModelDrafter(target, small_model()))
    drafter.begin(CONTEXT, STATES)
    accepted = drafter.draft(ROOT, TreePlan("chain", depth=3)).tokens[:2]
    for times in (1, 2):
        drafter.extend([ROOT, *accepted], STATES)
        check_cache(drafter, CONTEXT + [ROOT, *accepted] * times)


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("nodes", [None, 14])
@pytest.mark.parametrize("kind", KINDS)
def test_greedy_answers_are_those_of_plain_decoding(target, plain, kind, nodes, exact):
    model = Model(target, SmallModelDrafter(target, small_model()), TreePlan(kind, depth=4, top_k=6, nodes=nodes))
    answer = model.generate(PROMPT, max_new_tokens=24, exact=exact)
    assert answer.token_ids == plain
    if nodes or kind != "dynamic":  # elsewhere the measured costs may say that drafts don't pay
        assert answer.stats.drafted > 0
    text = Model(target).generate(PROMPT, max_new_tokens=24).text
    stop = text.split()[10]
    assert model.generate(PROMPT, max_new_tokens=24, exact=exact, stop=stop).text == text.split(stop)[0]


@pytest.mark.parametrize("kind", KINDS)
def test_sampled_answers_are_those_of_plain_decoding(target, kind):
    drafter = One(SmallModelDrafter(target, endless()))
    model = Model(target, drafter.drafter, TreePlan(kind, depth=4, top_k=6, nodes=14))
    for seed in range(3):
        options = {"max_new_tokens": 16, "temperature": 0.8, "top_p": 0.9, "seed": seed}
        answer = model.generate(PROMPT, **options)
        assert answer.token_ids == Model(target).generate(PROMPT, **options).token_ids
        assert answer.stats.tau > 1


@pytest.mark.parametrize("kind", ["chain", "static"])
def test_the_target_as_its_own_drafter_is_always_right(target, plain, kind):
    model = Model(target, SmallModelDrafter(target, target), TreePlan(kind, depth=4))
    answer = model.generate(PROMPT, max_new_tokens=21)
    assert answer.token_ids == plain[:21]
    assert answer.stats.accepted_at == {4: 4}
    assert answer.stats.tau == 5.0


def test_levels_that_gain_too_little_are_not_drafted(target):
    drafter = One(SmallModelDrafter(target, small_model()))
    drafter.begin(CONTEXT, STATES)
    plan = TreePlan("dynamic", depth=5, top_k=4)
    assert drafter.draft(ROOT, plan, min_expected_tokens=1.1).parents == []
    assert drafter.draft(ROOT, plan, min_expected_tokens=1.0).parents == [-1] * 4


def test_long_contexts_grow_the_cache(target):
    small = small_model(max_position_embeddings=2048)
    drafter = One(SmallModelDrafter(target, small))
    context = [3 + i * i % 61 for i in range(500)]
    drafter.begin(context, STATES)
    for _ in range(5):
        drafter.draft(ROOT, PLANS[-1])
        drafter.extend([ROOT, 5, 6], STATES)
        context += [ROOT, 5, 6]
        check_cache(drafter, context)
    drafter.begin(context * 3, STATES)
    check_cache(drafter, context * 3)
    drafter.begin(CONTEXT, STATES)
    check_cache(drafter, CONTEXT)


def test_contexts_longer_than_the_small_models_own_are_decoded_plainly(target, plain):
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=12, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    small = Target(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny-gpt2")
    drafter = One(SmallModelDrafter(target, small))
    model = Model(target, drafter.drafter, TreePlan("chain", depth=4))
    answer = model.generate(PROMPT, max_new_tokens=24)  # a prompt of 6 tokens
    assert answer.token_ids == plain
    assert 0 < answer.stats.drafted < 4 * answer.stats.passes
    drafter.begin([5] * 13, STATES)
    assert drafter.draft(ROOT, TreePlan()).tokens == []
    drafter.begin([5] * 11, STATES)
    assert max(drafter.draft(ROOT, TreePlan("dynamic", top_k=3)).parents) == -1


@pytest.mark.parametrize(("ours", "theirs"), [(64, 80), (80, 64)])
def test_embedding_tables_may_differ_in_padding(ours, theirs):
    target = endless(vocab_size=ours)
    drafter = One(SmallModelDrafter(target, small_model(vocab_size=theirs)))
    model = Model(target, drafter.drafter, TreePlan("dynamic", depth=3, top_k=4, nodes=10))
    expected = Model(target).generate(PROMPT, max_new_tokens=24).token_ids
    assert model.generate(PROMPT, max_new_tokens=24).token_ids == expected
    drafter.begin(CONTEXT, STATES)
    assert max(drafter.draft(ROOT, TreePlan("chain", depth=16)).tokens) < 64
    drafter.begin([*CONTEXT, ours - 1], STATES)
    assert bool(drafter.draft(ROOT, TreePlan()).tokens) == (ours <= theirs)


def other_tokenizer():
    tokenizer = tiny_tokenizer()
    tokenizer.add_tokens(["w64"])
    return tokenizer


def test_another_vocabulary_is_refused(target):
    small = Target(tiny_model(vocab_size=65), other_tokenizer(), "foreign")
    with pytest.raises(
        BeagleError, match=r"'foreign' has another vocabulary than tiny-llama \(1 tokens differ\)"
    ) as refusal:
        SmallModelDrafter(target, small)
    assert "\n" not in str(refusal.value)


def test_loading_by_name(tmp_path):
    for name, tokenizer in (("target", tiny_tokenizer()), ("small", tiny_tokenizer()), ("foreign", other_tokenizer())):
        tiny_model(vocab_size=len(tokenizer)).save_pretrained(tmp_path / name)
        tokenizer.save_pretrained(tmp_path / name)
    options = {"dtype": "float32", "device": "cpu"}
    model = beagle.load(str(tmp_path / "target"), draft=f"model:{tmp_path / 'small'}", **options)
    assert isinstance(model.drafter, SmallModelDrafter)
    assert model.drafter.small is not model.target
    assert model.drafter.name == f"model:{tmp_path / 'small'}"
    with pytest.raises(BeagleError, match="another vocabulary") as refusal:
        beagle.load(str(tmp_path / "target"), draft=f"model:{tmp_path / 'foreign'}", **options)
    assert str(tmp_path / "foreign") in str(refusal.value)
    assert str(tmp_path / "target") in str(refusal.value)
    for missing in ("", str(tmp_path / "nowhere")):
        with pytest.raises(BeagleError, match=f"draft model '{missing}'"):
            beagle.load(str(tmp_path / "target"), draft=f"model:{missing}", **options)
