"""The real target and the shipped head: lossless, and worth its while."""

from __future__ import annotations

import pytest
import torch

import beagle
from beagle.decoding.decoder import Decoder, decode
from beagle.decoding.sampling import Sampler
from beagle.decoding.sampling_params import SamplingParams
from beagle.decoding.sequence import Sequence, Step
from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.evaluation.hf_generate import HFGenerate
from beagle.targets.chat import encode
from beagle.targets.loading import load_model
from beagle.targets.plan import EXACT_TOKENS
from conftest import REAL_CACHE

pytestmark = [pytest.mark.slow, pytest.mark.network]
QUESTIONS = (
    "A shop sells 7 red and 5 blue pens a day. How many pens does it sell in 6 days? Think step by step.",
    "Write a Python function that reverses a string.",
)


def real_model(dtype: str) -> beagle.Model:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))  # the download is kept between runs
        return beagle.load("smollm2-135m", dtype=dtype, device="cpu", plan=TreePlan("dynamic", 5, 6, 8))


@pytest.fixture(scope="module")
def model() -> beagle.Model:
    return real_model("float32")


@pytest.fixture(scope="module")
def stock():
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("BEAGLE_CACHE", str(REAL_CACHE))
        return load_model("smollm2-135m", dtype="float32", device="cpu")[0]


@pytest.fixture(scope="module")
def half() -> beagle.Model:
    return real_model("bfloat16")


def test_fp32_answers_are_the_targets_own_and_the_shipped_head_is_trained(model, stock):
    options, stats = {"max_new_tokens": 40}, Stats()
    for question in QUESTIONS:
        plain = model.generate(question, draft=False, **options)
        fast = model.generate(question, **options)
        ids = encode(model.target, question)
        library, _ = HFGenerate(stock).answer("transformers", ids, SamplingParams(40))
        assert fast.token_ids == plain.token_ids == library
        assert fast.text == plain.text
        stats.add(fast.stats)
    assert stats.tau > 1.5  # a random head stays below 1.05


def test_sampling_is_the_same_with_and_without_drafts(model):
    options = {"max_new_tokens": 24, "temperature": 0.8, "top_p": 0.9, "seed": 3}
    plain = model.generate(QUESTIONS[0], draft=False, **options)
    assert model.generate(QUESTIONS[0], **options).token_ids == plain.token_ids


@pytest.mark.parametrize("kind", ["chain", "dynamic"])
def test_bf16_exact_mode_is_equal_to_the_bit(half, kind):
    target, ids = half.target, encode(half.target, QUESTIONS[1])

    def run(drafter):
        steps: list[Step] = []
        decoder = Decoder(target, drafter=drafter, plan=TreePlan(kind, 5, 6, EXACT_TOKENS - 1), exact=True)
        emitted = decode(decoder, Sequence(ids, 16, Sampler(eos_ids=target.eos_ids), watch=steps.append))
        tokens = [token for step in emitted for token in step.tokens]
        return tokens, torch.cat([step.states[step.path] for step in steps])

    plain_tokens, plain_states = run(None)
    tokens, states = run(half.drafter)
    assert tokens == plain_tokens
    n = min(len(states), len(plain_states))
    assert torch.equal(states[:n], plain_states[:n])
