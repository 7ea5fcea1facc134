"""Exact mode in bf16: bit-equal states and answers, with and without drafts."""

from __future__ import annotations

import pytest
import torch

from beagle.decoding.decoder import Decoder, decode
from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.decoding.sequence import Sequence
from beagle.decoding.stats import Stats
from beagle.drafters.base import TreePlan
from beagle.errors import BeagleError
from beagle.model import Model
from beagle.targets.plan import EXACT_BLOCK, EXACT_TOKENS
from beagle.targets.shape import TreeShape
from conftest import Oracle, tiny_drafter, tiny_target

FAMILIES = ["llama", "qwen3", "gemma3_text"]
CONTEXT = [5, 9, 33, 12, 60, 41, 7, 7, 28, 50, 19]
PARENTS = [-1, 0, 0, 1, 1, 2, 3, 6, 5, 0]
TOKENS = [10, 11, 12, 13, 14, 15, 16, 17, 18, 11]


@pytest.fixture(params=[*FAMILIES, "llama-padded"])
def bf16(request):
    family, _, padded = request.param.partition("-")
    target = tiny_target(family, dtype=torch.bfloat16)
    target.eos_ids = frozenset()
    if padded:
        target.min_exact_tokens = EXACT_TOKENS  # as where kernels differ by number of rows
    return target


def run(target, drafter, plan, *, n=24, **sampling):
    """Answer tokens, and the state of every accepted node in order."""
    states, stats = [], Stats()
    answer = Sequence(CONTEXT, n, Sampler(SamplingParams(**sampling)), stats=stats)
    answer.watch = lambda step: states.append(step.states[step.path].clone())
    steps = decode(Decoder(target, drafter=drafter, plan=plan, exact=True), answer)
    tokens = [token for step in steps for token in step.tokens]
    return tokens, torch.cat(states), stats


@pytest.mark.parametrize("kind", ["chain", "static", "dynamic", "oracle"])
def test_states_and_answers_are_bitwise_those_of_plain_decoding(bf16, kind):
    plain_tokens, plain_states, plain_stats = run(bf16, None, None)
    assert plain_stats.tau == 1.0
    if kind == "oracle":
        drafter, plan = Oracle(plain_tokens), TreePlan("chain", depth=5)
    else:
        drafter, plan = tiny_drafter(bf16), TreePlan(kind, depth=4, top_k=6, nodes=14)
    tokens, states, stats = run(bf16, drafter, plan)
    assert tokens == plain_tokens
    assert torch.equal(states, plain_states)
    if kind == "oracle":
        assert stats.tau > 5


def test_sampled_answers_are_equal_too(bf16):
    plain = run(bf16, None, None, temperature=0.8, top_p=0.9, seed=3)
    drafted = run(bf16, Oracle(plain[0]), TreePlan("chain", depth=6), temperature=0.8, top_p=0.9, seed=3)
    assert drafted[0] == plain[0]
    assert torch.equal(drafted[1], plain[1])
    assert drafted[2].tau > 4


def test_one_tree_is_bitwise_its_paths_alone(bf16):
    keys = EXACT_BLOCK
    cache = bf16.new_cache(1, keys)
    bf16.prefill(torch.tensor([CONTEXT]), cache)
    tree = bf16.verify_exact(cache, torch.tensor(TOKENS), TreeShape(PARENTS), keys)
    for leaf in (4, 7, 8, 9):
        path = [leaf]
        while PARENTS[path[0]] >= 0:
            path.insert(0, PARENTS[path[0]])
        alone = bf16.new_cache(1, keys)
        bf16.prefill(torch.tensor([CONTEXT]), alone)
        for node in path:
            state = bf16.verify_exact(alone, torch.tensor([TOKENS[node]]), TreeShape([-1]), keys)
            alone.compact([0])
            assert torch.equal(state[0], tree[node])


def test_generate_exact_with_and_without_drafter(bf16):
    prompt = "w5 w9 w33 w12"
    plain = Model(bf16).generate(prompt, max_new_tokens=30, exact=True)
    model = Model(bf16, tiny_drafter(bf16), TreePlan("dynamic", depth=4, top_k=6))
    assert model.generate(prompt, max_new_tokens=30, exact=True).token_ids == plain.token_ids


def test_kernels_that_differ_by_number_of_rows_are_found_out(monkeypatch):
    target = tiny_target(dtype=torch.bfloat16)
    eager = target.eager
    monkeypatch.setattr(target, "eager", lambda ids, plan: eager(ids, plan) * (1.02 if ids.shape[1] == 7 else 1))
    assert target.min_exact_tokens == 8


def test_half_precision_on_a_gpu_has_no_exact_mode():
    for dtype in (torch.bfloat16, torch.float32):
        target = tiny_target(dtype=dtype)
        assert target.why_not_exact is None
        target.device = torch.device("cuda")
        if dtype == torch.float32:
            assert target.min_exact_tokens == EXACT_TOKENS
            continue
        with pytest.raises(
            BeagleError, match=r"^there is no exact mode for tiny-llama: in half precision on a GPU.*float32"
        ):
            Decoder(target, exact=True)
