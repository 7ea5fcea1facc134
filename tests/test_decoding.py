"""The decoding loop end to end: lossless, bounded, ended by EOS, counted right."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.target import Target
from conftest import FAMILIES, LIVELY, Oracle, tiny_drafter, tiny_model, tiny_target, tiny_tokenizer

PROMPT = "w5 w9 w33 w12"
KINDS = ["chain", "static", "dynamic"]


def plan(kind: str, **options) -> TreePlan:
    return TreePlan(kind, **{"depth": 4, "top_k": 6, "nodes": 14, **options})


def endless(family: str = "llama", **options) -> Target:
    target = tiny_target(family, **options)
    target.eos_ids = frozenset()
    return target


@pytest.fixture(scope="module")
def family_answers():
    """Per family, the target and its plain answer."""
    known = {}

    def get(family):
        if family not in known:
            target = endless(family)
            known[family] = target, Model(target).generate(PROMPT, max_new_tokens=24).token_ids
        return known[family]

    return get


# heads don't know families, so one family stands for all with the second architecture
PAIRS = [(family, "beagle") for family in FAMILIES] + [("gemma3_text", "eagle")]


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(("family", "architecture"), PAIRS)
def test_greedy_answers_are_those_of_plain_decoding(family_answers, family, architecture, kind, exact):
    target, plain = family_answers(family)
    drafter = tiny_drafter(target, architecture=architecture)
    answer = Model(target, drafter, plan(kind)).generate(PROMPT, max_new_tokens=24, exact=exact)
    assert answer.token_ids == plain
    assert answer.stats.drafted > 0


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "granite"])
def test_plain_answers_are_those_of_transformers(family_answers, family):
    plain = family_answers(family)[1]
    model, made = tiny_model(family), []
    ids = tiny_tokenizer()(f"<s> {PROMPT} <s>")["input_ids"]  # what the template makes of it
    with torch.no_grad():
        for _ in range(24):
            made.append(int(model(input_ids=torch.tensor([ids + made])).logits[0, -1].argmax()))
    assert plain == made


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("limit", range(1, 10))
def test_limit_is_met_and_never_overshot(family_answers, limit, exact):
    target, plain = family_answers("llama")
    model = Model(target, Oracle(plain), plan("chain", depth=5))
    answer = model.generate(PROMPT, max_new_tokens=limit, exact=exact)
    assert answer.token_ids == plain[:limit]
    assert answer.stats.tokens == limit
    assert answer.stats.passed_tokens == limit - 1


@pytest.mark.parametrize("exact", [False, True])
@pytest.mark.parametrize("at", [0, 1, 2, 3, 5, 8])
def test_eos_inside_a_draft_ends_the_answer(family_answers, at, exact):
    plain = family_answers("llama")[1]
    target = endless()
    while plain[at] in plain[:at]:
        at += 1
    target.eos_ids = frozenset({plain[at]})
    answer = Model(target, Oracle(plain), plan("chain", depth=6)).generate(PROMPT, max_new_tokens=24, exact=exact)
    assert answer.token_ids == plain[: at + 1]
    assert answer.stats.tokens == at + 1
    assert answer.stats.passed_tokens == at
    assert sum(answer.stats.accepted_at.values()) == answer.stats.passes
    assert sum((d + 1) * n for d, n in answer.stats.accepted_at.items()) == at  # nothing after EOS was accepted


def test_special_tokens_are_not_in_the_text():
    target = tiny_target()
    plain = Model(target).generate(PROMPT, max_new_tokens=24)
    assert "<" not in plain.text
    assert plain.text == target.tokenizer.decode(plain.token_ids, skip_special_tokens=True)


@pytest.mark.parametrize("architecture", LIVELY)
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "sampling", [{"temperature": 1.0}, {"temperature": 0.7, "top_k": 20}, {"temperature": 1.3, "top_p": 0.8}]
)
def test_a_seed_gives_the_same_answer_with_and_without_drafts(kind, sampling, architecture):
    target = endless("qwen3")
    drafted, plain = Model(target, tiny_drafter(target, architecture=architecture), plan(kind)), Model(target)
    answers = set()
    for seed in range(3):
        options = {"max_new_tokens": 16, "seed": seed, **sampling}
        answer = plain.generate(PROMPT, **options)
        assert drafted.generate(PROMPT, **options).token_ids == answer.token_ids
        answers.add(tuple(answer.token_ids))
    assert len(answers) == 3


def test_plain_decoding_has_tau_one(family_answers):
    target, plain = family_answers("llama")
    stats = Model(target).generate(PROMPT, max_new_tokens=24).stats
    assert stats.tau == 1.0
    assert (stats.tokens, stats.passes, stats.passed_tokens, stats.drafted) == (24, 23, 23, 0)
    assert stats.accepted_at == {0: 23}
    off = Model(target, tiny_drafter(target), plan("chain")).generate(PROMPT, max_new_tokens=24, draft=False)
    assert off.stats.tau == 1.0
    assert off.token_ids == plain


def test_perfect_drafts_have_the_best_tau(family_answers):
    target, plain = family_answers("llama")
    stats = Model(target, Oracle(plain), plan("chain", depth=3)).generate(PROMPT, max_new_tokens=21).stats
    assert stats.passes == 5
    assert stats.tau == 4.0
    assert stats.accepted_at == {3: 5}
    assert stats.step_alpha == [1.0, 1.0, 1.0]


def test_step_alpha_and_pooling():
    stats = Stats(tokens=12, passes=10, passed_tokens=11, accepted_at={0: 4, 1: 3, 3: 3})
    assert [stats.reached(d) for d in range(5)] == [10, 6, 3, 3, 0]
    assert stats.step_alpha == pytest.approx([0.6, 0.5, 1.0])
    other = Stats(tokens=5, passes=2, passed_tokens=4, decode_seconds=2.0, accepted_at={1: 2})
    stats.add(other)
    assert stats.tau == pytest.approx(15 / 12)
    assert stats.accepted_at == {0: 4, 1: 5, 3: 3}
    assert stats.tokens_per_second == pytest.approx(7.5)
    assert stats.as_dict()["accepted_at_depth"] == {"0": 4, "1": 5, "3": 3}
    assert Stats().tau == 1.0
    assert Stats().step_alpha == []


@pytest.mark.parametrize("kind", [None, *KINDS])
@pytest.mark.parametrize("architecture", LIVELY)
def test_context_limit_is_respected(kind, architecture):
    target = endless(max_position_embeddings=24)
    drafter = tiny_drafter(target, architecture=architecture) if kind else None
    model = Model(target, drafter, plan(kind or "chain"))
    prompt = " ".join(f"w{i}" for i in range(3, 17))
    answer = model.generate(prompt, max_new_tokens=100, raw=True)
    assert len(answer.token_ids) == 24 - 14
    with pytest.raises(BeagleError, match="shorten the prompt"):
        model.generate(" ".join(["w3"] * 24), raw=True)


def test_drafts_stay_inside_learned_positions():
    torch.manual_seed(0)
    config = AutoConfig.for_model(
        "gpt2", n_embd=32, n_layer=2, n_head=4, n_positions=24, vocab_size=64, bos_token_id=1, eos_token_id=2
    )
    target = Target(AutoModelForCausalLM.from_config(config), tiny_tokenizer(), "tiny-gpt2")
    target.eos_ids = frozenset()
    prompt = " ".join(f"w{i}" for i in range(3, 17))
    plain = Model(target).generate(prompt, max_new_tokens=100, raw=True).token_ids
    wrong = Oracle([(token + 1) % 64 for token in plain] * 2)
    answer = Model(target, wrong, plan("chain")).generate(prompt, max_new_tokens=100, raw=True)
    assert answer.token_ids == plain


@pytest.mark.parametrize(
    ("prompt", "options", "word"),
    [
        ("", {}, "empty"),
        (" \n", {}, "empty"),
        ([], {}, "empty"),
        ("w3", {"max_new_tokens": 0}, "max_new_tokens"),
        ("w3", {"max_new_tokens": -1}, "max_new_tokens"),
        ("w3", {"temperature": -1.0}, "temperature"),
        ("w3", {"top_p": 0.0}, "top_p"),
        ("w3", {"stop": ["a", ""]}, "stop string"),
        pytest.param("w3", {"max_new_tokens": -1, "temperature": 1.0}, "max_new_tokens"),
    ],
)
def test_bad_requests_are_refused(target, prompt, options, word):
    with pytest.raises(BeagleError, match=word):
        Model(target).generate(prompt, **options)


def test_dialogue_without_template_is_refused(target):
    target.tokenizer.chat_template = None
    with pytest.raises(BeagleError, match="chat template"):
        Model(target).generate([{"role": "user", "content": "w3"}])
