"""The compiled levels of a draft tree: the same drafts as the eager ones, for the very weights they were made of."""

import json
import shutil

import pytest
import torch

from beagle.decoding.sampling import Sampler, SamplingParams
from beagle.drafters import compiled
from beagle.drafters.base import TreePlan
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.targets.target import Target
from conftest import SCALES, tiny_head, tiny_model, tiny_tokenizer
from drafting import One, paths

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not any(shutil.which(name) for name in ("g++", "clang++")), reason="there is no C++ compiler"),
]
TOKENS = list(range(3, 12))
PLANS = {
    "dynamic": TreePlan("dynamic", 4, 4, 20),
    "static": TreePlan("static", 5),
    "chain": TreePlan("chain", 4),
}


CASES = {
    "beagle": {"kv_layers": (1, 2), "blocks": 2, "num_kv_heads": 2},
    "eagle": {"quantize": "int8", "draft_vocab_size": 48},
    "eagle3": {"kv_layers": (1, 2)},
}


def case(name: str):
    """A target, and how to make the head anew: a drafter packs its own."""
    overrides = dict(CASES[name])
    quantize, layers = overrides.pop("quantize", None), overrides.get("kv_layers", ())
    target = Target(tiny_model("llama"), tiny_tokenizer(), "tiny-llama", quantize, state_layers=layers)
    return target, lambda: tiny_head(target, architecture=name, scale=SCALES[name], **overrides)


@pytest.fixture(scope="module", params=list(CASES))
def folder(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp("levels") / request.param
    target, head = case(folder.name)
    compiled.build(folder, target, head(), "tiny")
    return folder


@pytest.fixture(scope="module")
def both(folder) -> tuple[HeadDrafter, HeadDrafter]:
    """An eager one, and one with the levels that ``build`` made of its head."""
    target, head = case(folder.name)
    own = head()
    found = compiled.find(folder, target, own)
    assert found is not None
    fast = HeadDrafter(target, own)
    fast.use(found, "compiled")
    return HeadDrafter(target, head()), fast


def states(drafter: HeadDrafter, n: int) -> torch.Tensor:
    return torch.randn(n, drafter.head.config.state_size, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("plan", PLANS.values(), ids=list(PLANS))
@pytest.mark.parametrize("least", [0.0, 0.4])
def test_its_drafts_are_the_eager_ones(both, plan, least):
    found = []
    for drafter in map(One, both):
        drafter.begin(TOKENS, states(drafter, len(TOKENS)))
        drafts = [drafter.draft(12, plan, least)]  # with nothing unread; what it leaves behind is written over
        for unread in (1, 2, 5, 70):
            drafter.extend([12 + i % 20 for i in range(unread)], states(drafter, unread))
            drafts.append(drafter.draft(14, plan, least))
        found.append(drafts)
    for eager, fast in zip(*found, strict=True):
        assert paths(fast) == pytest.approx(paths(eager), abs=1e-4)
    if least and plan.kind == "dynamic":
        assert min(len(draft.tokens) for draft in found[0]) < plan.nodes, "no draft ends early"


def test_its_drafts_know_the_sampler_s_noise(both):
    found = []
    for drafter in map(One, both):
        drafter.begin(TOKENS, states(drafter, len(TOKENS)))
        drafter.context.noise = Sampler(SamplingParams(temperature=1.0, seed=3)).noise(len(TOKENS))
        found.append(drafter.draft(12, PLANS["dynamic"]))
        drafter.context.noise = None
        assert drafter.draft(12, PLANS["dynamic"]).tokens != found[-1].tokens
    assert found[1].tokens == found[0].tokens


@pytest.mark.parametrize("plan", ["dynamic", "chain"])
def test_trees_of_one_context_are_computed_in_it(both, plan, monkeypatch):
    fast = One(both[1])
    fast.begin(TOKENS, states(fast, len(TOKENS)))
    expected = fast.draft(12, PLANS[plan])
    monkeypatch.setattr(fast.head, "level", None)  # the eager level
    assert fast.draft(12, PLANS[plan]) == expected


def test_several_contexts_are_drafted_eagerly(both):
    eager, fast = both
    found = []
    for drafter in (eager, fast):
        contexts = [drafter.context() for _ in range(2)]
        for i, context in enumerate(contexts):
            context.extend(TOKENS[i:], states(drafter, len(TOKENS) - i))
        found.append(drafter.draft(contexts, [12, 13], PLANS["dynamic"]))
    assert [draft.tokens for draft in found[1]] == [draft.tokens for draft in found[0]]


def test_other_weights_have_none(folder):
    target, head = case(folder.name)
    other = head()
    assert compiled.find(folder, target, other) is not None
    next(other.parameters()).data.view(-1)[0] += 1
    assert compiled.find(folder, target, other) is None


def test_a_broken_package_is_named(folder, both):
    (place,) = folder.iterdir()
    (place / "about.json").write_text(json.dumps({}))
    target, head = case(folder.name)
    with pytest.raises(BeagleError, match="delete the folder"):
        compiled.find(folder, target, head())
