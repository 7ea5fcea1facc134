"""Penalties, bias and lengths: the same with and without drafts, and as transformers has them."""

from __future__ import annotations

import math

import pytest
import torch
from transformers import GenerationConfig, MinPLogitsWarper

from beagle import SamplingParams, load
from beagle.decoding.sampling import Sampler
from beagle.decoding.sampling_params import BatchOptions, SamplingOptions
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from conftest import Oracle, tiny_drafter, tiny_target

PROMPT = [5, 9, 33, 12, 9]
PROMPTS = [PROMPT, [7], [40, 41, 42, 9, 9, 9, 3]]
LENGTH = 24
EOS = frozenset({2, 17, 18, 30})
SETTINGS = {
    "repetition": {"repetition_penalty": 1.7},
    "presence": {"presence_penalty": 1.5},
    "frequency": {"frequency_penalty": 1.2},
    "bias": {"logit_bias": {7: 3.0, 12: -50.0, 63: 2.5}},
    "minimum": {"min_new_tokens": 20},
    "no end": {"ignore_eos": True},
    "more ends": {"stop_token_ids": [3, 8, 21, 40]},
    "all": {
        "repetition_penalty": 1.2,
        "presence_penalty": 0.5,
        "frequency_penalty": -0.4,
        "logit_bias": {7: 3.0, 12: -50.0},
        "min_new_tokens": 9,
        "stop_token_ids": [3, 8],
        "min_p": 0.02,
    },
}
WAYS = {"greedy": {}, "sampled": {"temperature": 1.1, "top_k": 40, "top_p": 0.95, "min_p": 0.05, "seed": 6}}
PLANS = {"chain": TreePlan("chain", depth=4), "dynamic": TreePlan("dynamic", depth=4, top_k=4, nodes=12)}


@pytest.fixture(scope="module")
def target():
    target = tiny_target()
    target.eos_ids = EOS
    return target


@pytest.fixture(scope="module")
def drafter(target):
    return tiny_drafter(target)


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("setting", SETTINGS)
def test_the_same_with_and_without_drafts(target, drafter, setting, way):
    options = {"max_new_tokens": LENGTH, **WAYS[way], **SETTINGS[setting]}
    plain = [Model(target).generate(prompt, **options).token_ids for prompt in PROMPTS]
    assert plain != [Model(target).generate(prompt, max_new_tokens=LENGTH, **WAYS[way]).token_ids for prompt in PROMPTS]
    assert [a.token_ids for a in Model(target).generate_batch(PROMPTS, rows=2, **options)] == plain
    every = setting == "all"  # the settings change logits and ends, whatever the pass and the tree
    for plan in PLANS.values() if every else [PLANS["dynamic"]]:
        model = Model(target, drafter, plan)
        assert [model.generate(prompt, **options).token_ids for prompt in PROMPTS] == plain
        assert [a.token_ids for a in model.generate_batch(PROMPTS, rows=2, **options)] == plain
        for exact in (Model(target), model) if every else []:
            assert [exact.generate(prompt, exact=True, **options).token_ids for prompt in PROMPTS] == plain
    for prompt, answer in zip(PROMPTS, plain, strict=True):  # drafts that are all accepted
        oracle = Model(target, Oracle(answer), PLANS["chain"])
        drafted = oracle.generate(prompt, **options)
        assert drafted.token_ids == answer
        assert drafted.stats.tau > 3 or len(answer) < 12


@pytest.mark.parametrize("setting", ["repetition", "bias", "minimum", "no end"])
def test_greedy_answers_are_those_of_transformers(setting):
    target = tiny_target()
    ours = dict(SETTINGS[setting])
    theirs = dict(ours)
    if bias := theirs.pop("logit_bias", None):
        theirs["sequence_bias"] = {(token,): value for token, value in bias.items()}
    ends = sorted(EOS)
    if theirs.pop("ignore_eos", False):
        ends = None
    target.eos_ids = EOS
    model = Model(target, tiny_drafter(target), PLANS["dynamic"])
    stock = tiny_target().model  # a copy with attention of its own
    stock.set_attn_implementation("eager")
    for prompt in PROMPTS:
        ids = torch.tensor([prompt])
        config = GenerationConfig(do_sample=False, max_new_tokens=LENGTH, eos_token_id=ends, pad_token_id=0, **theirs)
        expected = stock.generate(ids, attention_mask=torch.ones_like(ids), generation_config=config)[0, len(prompt) :]
        assert model.generate(prompt, max_new_tokens=LENGTH, **ours).token_ids == expected.tolist()


def test_penalties_count_the_answer_alone():
    """As OpenAI defines them: mu[j] - c[j] * frequency - float(c[j] > 0) * presence."""
    sampler = Sampler(SamplingParams(presence_penalty=0.5, frequency_penalty=0.25), prompt=[3, 3, 4])
    logits = torch.arange(8, dtype=torch.float32)
    assert torch.equal(sampler.process(logits), logits)
    for token in (4, 6, 6):
        sampler.ended(token)
    expected = [0.0, 1.0, 2.0, 3.0, 4 - 0.75, 5.0, 6 - 1.0, 7.0]
    assert sampler.process(logits).tolist() == expected
    assert sampler.choose(logits, 3) == 7


def test_min_p_is_that_of_transformers():
    torch.manual_seed(0)
    for logits in torch.randn(20, 50) * 3:
        for min_p in (0.01, 0.2, 1.0):
            p = Sampler(SamplingParams(temperature=1.0, min_p=min_p)).probabilities(logits)
            theirs = MinPLogitsWarper(min_p)(torch.tensor([[0]]), logits[None])[0]
            assert torch.equal(p > 0, theirs > -math.inf)
            assert torch.allclose(p.float(), torch.softmax(theirs, -1), atol=1e-6)


def test_a_stop_token_is_in_the_tokens_but_not_in_the_text(target):
    whole = Model(target).generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True)
    at = 6
    stop = whole.token_ids[at]
    first = whole.token_ids.index(stop)
    for answer in (
        Model(target).generate(PROMPT, max_new_tokens=LENGTH, ignore_eos=True, stop_token_ids=[stop]),
        Model(target, Oracle(whole.token_ids), PLANS["chain"]).generate(
            PROMPT, max_new_tokens=LENGTH, ignore_eos=True, stop_token_ids=[stop]
        ),
        Model(target).generate_batch([PROMPT], max_new_tokens=LENGTH, ignore_eos=True, stop_token_ids=[stop])[0],
    ):
        assert answer.token_ids == whole.token_ids[: first + 1]
        assert answer.text == target.tokenizer.decode(whole.token_ids[:first], skip_special_tokens=True)


def test_params_and_keywords(target):
    model = Model(target)
    params = SamplingParams(max_new_tokens=9, temperature=1.0, seed=3)
    assert model.generate(PROMPT, params).token_ids == (
        model.generate(PROMPT, max_new_tokens=9, temperature=1.0, seed=3).token_ids
    )
    assert model.generate(PROMPT, params, seed=5).token_ids == (
        model.generate(PROMPT, max_new_tokens=9, temperature=1.0, seed=5).token_ids
    )
    assert [a.token_ids for a in model.generate_batch([PROMPT, PROMPT], params, seed=[3, 5])] == [
        model.generate(PROMPT, params, seed=seed).token_ids for seed in (3, 5)
    ]
    assert [a.token_ids for a in model.generate_batch([PROMPT], params)] == [model.generate(PROMPT, params).token_ids]
    with pytest.raises(TypeError, match="temprature"):
        model.generate(PROMPT, temprature=1.0)


def test_keywords_are_the_fields():
    fields = set(SamplingParams.__dataclass_fields__)
    assert set(SamplingOptions.__annotations__) == fields
    assert set(BatchOptions.__annotations__) == fields - {"seed"}


@pytest.mark.parametrize("options", [{"stop_token_ids": [64]}, {"logit_bias": {64: 1.0}}], ids=str)
def test_tokens_outside_the_vocabulary_are_refused(target, options):
    for ask in (Model(target).generate, lambda *a, **o: Model(target).generate_batch([a[0]], **o)):
        with pytest.raises(BeagleError, match="token 64; the vocabulary has ids from 0 to 63"):
            ask(PROMPT, **options)


def test_the_command_takes_them(folders, beagle):
    options = {"repetition_penalty": 1.7, "presence_penalty": 0.5, "frequency_penalty": 0.25, "min_new_tokens": 9}
    flags = [part for name, value in options.items() for part in (f"--{name.replace('_', '-')}", value)]
    model = load(str(folders.target), draft=None, dtype="float32")
    sampled = {"temperature": 1.1, "min_p": 0.1, "seed": 7, "ignore_eos": True}
    expected = model.generate("w5 w9", max_new_tokens=12, **options, **sampled).text
    assert expected != model.generate("w5 w9", max_new_tokens=12, **sampled).text
    for draft in ("none", "lookup"):
        ended = beagle("generate", "w5 w9", "--target", folders.target, "--dtype", "float32", "--draft", draft, "-n", 12,
                        *flags, "--temperature", 1.1, "--min-p", 0.1, "--seed", 7, "--ignore-eos")  # fmt: skip
        assert (ended.code, ended.out.rstrip("\n")) == (0, expected)


@pytest.mark.parametrize("value", ["nan", "inf"])
def test_the_command_refuses_what_is_no_number(folders, beagle, value):
    for flag in ("--temperature", "--repetition-penalty", "--top-p"):
        ended = beagle(
            "generate", "w5", "--target", folders.target, "--dtype", "float32", "--draft", "none", flag, value
        )
        assert ended.code == 2
        assert flag in ended.err or f"{flag[2:].replace('-', '_')} is {value}" in ended.err


def test_a_limit_that_is_never_met_needs_no_memory(folders, beagle):
    """Neither random numbers nor slots of the cache are made for tokens that never come."""
    ended = beagle("generate", "w5", "--target", folders.target, "--dtype", "float32", "--draft", "none", "-n", 10**9,
                    "--temperature", 1, "--stop", "w")  # fmt: skip
    assert ended.code == 0
