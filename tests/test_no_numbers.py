"""Logits that are no finite numbers: refused by name wherever a token is chosen."""

from __future__ import annotations

import pytest
import torch

from beagle.decoding.sampling import Sampler
from beagle.decoding.walk import Verdict, Walk, accept
from beagle.drafters.base import Draft, TreePlan
from beagle.errors import BeagleError
from beagle.integrations.transformers import speculate
from beagle.model import Model
from beagle.targets.target import Target
from beagle.training.answers import AnswerGenerator
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig
from conftest import tiny_drafter, tiny_model, tiny_target, tiny_tokenizer

PROMPT = [5, 9, 33, 12]
PLAN = TreePlan("dynamic", depth=3, top_k=4, nodes=8)
BROKEN = {
    "nan": lambda logits: logits * torch.nan,
    "one nan": lambda logits: logits.index_fill(-1, torch.tensor(63), torch.nan),
    "inf": lambda logits: logits.index_fill(-1, torch.tensor(63), torch.inf),
    "-inf": lambda logits: torch.full_like(logits, -torch.inf),
}
WAYS = {
    "greedy": {},
    "sampled": {"temperature": 1.0},
    "top": {"temperature": 1.0, "top_k": 5, "top_p": 0.9, "min_p": 0.1},
    "penalty": {"repetition_penalty": 1.5},
    "both": {"repetition_penalty": 1.5, "temperature": 0.7},
}
ERROR = r"tiny-llama.*: its logits are (nan|-?inf), so no token can be chosen; load it with dtype float32"


def break_after(target, monkeypatch, passes: int, broken) -> None:
    """The target's logits are as they should be for some passes, then no more."""
    logits, done = target.logits, 0

    def other(states):
        nonlocal done
        done += 1
        return logits(states) if done <= passes else broken(logits(states))

    monkeypatch.setattr(target, "logits", other)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("broken", BROKEN)
@pytest.mark.parametrize("passes", [0, 1])
@pytest.mark.parametrize("exact", [False, True])
def test_an_answer_is_refused(monkeypatch, way, broken, passes, exact):
    target = tiny_target()
    if exact:
        _ = target.min_exact_tokens  # tried out with good logits
    drafter = tiny_drafter(target)
    for model in (Model(target), Model(target, drafter, PLAN)):
        with monkeypatch.context() as patch:
            break_after(target, patch, passes, BROKEN[broken])
            with pytest.raises(BeagleError, match=ERROR):
                model.generate(PROMPT, exact=exact, ignore_eos=True, max_new_tokens=8, **WAYS[way])
        if not exact:
            with monkeypatch.context() as patch:
                break_after(target, patch, passes, BROKEN[broken])
                with pytest.raises(BeagleError, match=ERROR):
                    model.generate_batch([PROMPT, [7]], ignore_eos=True, max_new_tokens=8, **WAYS[way])


@pytest.mark.parametrize("broken", BROKEN)
def test_training_answers_inherit_it(monkeypatch, broken):
    target = tiny_target()
    break_after(target, monkeypatch, 0, BROKEN[broken])
    with pytest.raises(BeagleError, match=ERROR):
        list(AnswerGenerator(target, AnswerConfig(rows=2)).run([Prompt("a", ("w5",))]))


@pytest.mark.parametrize("options", [{}, {"repetition_penalty": 1.5}, {"do_sample": True}], ids=str)
def test_a_drafting_generate_inherits_it(options):
    model = tiny_model()
    with torch.no_grad():
        model.get_input_embeddings().weight[40] = torch.nan
    speculate(model, "lookup", name="tiny-llama", plan=TreePlan("chain", nodes=4))
    ids = torch.tensor([[5, 9, 40]])
    with pytest.raises(BeagleError, match=ERROR):
        model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=4, **options)


def test_weights_that_are_no_numbers_are_refused_at_once():
    model = tiny_model()
    with torch.no_grad():
        model.model.norm.weight[3] = torch.nan
    with pytest.raises(BeagleError, match="tiny: its states are no finite numbers; load it with dtype float32"):
        Target(model, tiny_tokenizer(), "tiny")


def test_other_nodes_of_a_tree_may_be_no_numbers():
    """Only the way through the tree is asked: a candidate that isn't chosen changes no answer."""
    draft = Draft([7, 8], [-1, -1], [0.0, 0.0])
    logits = torch.zeros(3, 16)
    logits[0, 8] = logits[2, 3] = 1
    logits[1] = torch.nan
    for count in (1, 2):  # alone, and beside another sequence
        walks = [Walk(draft, Sampler(), first=3 * i, position=1, left=5) for i in range(count)]
        accept(walks, Verdict(logits.repeat(count, 1)))
        for walk in walks:
            assert (walk.path, walk.chosen, walk.ended, walk.error) == ([0, 2], [8, 3], False, None)


@pytest.mark.parametrize("kind", ["chain", "dynamic"])
def test_caches_grow_behind_a_prompt(monkeypatch, kind):
    target = tiny_target(max_position_embeddings=2**30)
    drafter = tiny_drafter(target)
    options = {"max_new_tokens": 90, "ignore_eos": True, "temperature": 1.0}
    prompts = [PROMPT, [7], [8, 9]]
    expected = [Model(target).generate(prompt, **options).token_ids for prompt in prompts]
    monkeypatch.setattr("beagle.decoding.live_cache.FIRST_SLOTS", 3)
    for model in (Model(target), Model(target, drafter, TreePlan(kind, depth=3, top_k=4, nodes=8))):
        assert [model.generate(prompt, **options).token_ids for prompt in prompts] == expected
        assert [a.token_ids for a in model.generate_batch(prompts, rows=2, **options)] == expected


def test_a_limit_that_is_never_met_costs_nothing():
    target = tiny_target(max_position_embeddings=2**31)
    plain = Model(target).generate(PROMPT, max_new_tokens=12, temperature=1.0, ignore_eos=True)
    for model in (Model(target), Model(target, tiny_drafter(target), PLAN)):
        for options in ({}, {"temperature": 1.0}):
            stream = model.stream(PROMPT, max_new_tokens=10**9, ignore_eos=True, **options)
            tokens = [token for _ in range(12) for token in next(stream).token_ids]
            stream.close()
            if options:
                assert tokens[:12] == plain.token_ids
        answers = model.generate_batch([PROMPT], max_new_tokens=10**9, stop_token_ids=[plain.token_ids[8]],
                                       ignore_eos=True, temperature=1.0)  # fmt: skip
        assert answers[0].token_ids == plain.token_ids[: plain.token_ids.index(plain.token_ids[8]) + 1]


def test_a_cache_that_does_not_fit_is_refused():
    target = tiny_target(max_position_embeddings=2**31)
    with pytest.raises(BeagleError, match=r"tiny-llama: no memory for a KV cache of \d+ tokens .* ask for fewer"):
        target.new_cache(1, 2**58)
