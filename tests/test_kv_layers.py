"""Heads that read several target layers, and heads of several blocks: what they read, and that answers stay the target's."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from beagle.drafters.base import TreePlan
from beagle.drafters.captured import CapturedDraft
from beagle.drafters.checkpoint import load_head, save_head
from beagle.drafters.compiled import build as build_levels
from beagle.drafters.compiled import find as find_levels
from beagle.drafters.head_drafter import HeadDrafter
from beagle.errors import BeagleError
from beagle.model import Model, load
from beagle.targets.captured import Captured
from beagle.targets.shape import TreeShape
from beagle.training.recipe import Recipe, read_recipe
from beagle.training.trainer import new_head
from conftest import (
    FAMILIES,
    LIVELY,
    SCALES,
    Recorder,
    tiny_drafter,
    tiny_head,
    tiny_model,
    tiny_target,
)
from drafting import One

PROMPTS = ["w5 w9 w33", "w3 w4 w5 w6 w3 w4 w5 w6 w3 w4", "w7", "w11 " * 13, "w60 w3"]
SHAPES = [{"kv_layers": (1,)}, {"blocks": 2}, {"kv_layers": (1, 2), "blocks": 3, "num_kv_heads": 2}]
EAGLE = {"architecture": "eagle", "kv_layers": (1, 2)}
EAGLE3 = {"architecture": "eagle3", "kv_layers": (1, 2)}
DYNAMIC = TreePlan("dynamic", 4, 4, 12)
IDS = torch.tensor([5, 9, 33, 12, 60, 41, 7, 8])


def drafting(shape: dict, **options) -> Model:
    target = tiny_target(state_layers=shape.get("kv_layers", ()))
    return Model(target, tiny_drafter(target, scale=SCALES[shape.get("architecture", "beagle")], **shape), **options)


def own_states(family: str, ids: torch.Tensor, layers: tuple[int, ...]) -> torch.Tensor:
    """What transformers says that the layers put out, and the top state."""
    found = tiny_model(family).base_model(input_ids=ids[None], output_hidden_states=True)
    return torch.cat([*(found.hidden_states[layer] for layer in layers), found.last_hidden_state], dim=-1)[0]


@pytest.mark.parametrize("family", FAMILIES)
@torch.no_grad()
def test_states_are_those_of_the_layers_in_every_kind_of_pass(family):
    target, expected = tiny_target(family, state_layers=(1, 2)), own_states(family, IDS, (1, 2))
    assert expected.shape == (len(IDS), target.state_size)
    cache = target.new_cache(2, 64)
    torch.testing.assert_close(target.prefill(IDS[None, :4], one := target.new_cache(1, 128))[0], expected[:4])
    tree = target.verify(one, torch.tensor([60, 3, 41, 4]), TreeShape([-1, 0, 0, 2]))
    torch.testing.assert_close(tree[[0, 2]], expected[4:6])
    exact = target.verify_exact(one, IDS[4:], TreeShape.chain(4), 64)
    torch.testing.assert_close(exact, expected[4:])
    rows = target.verify_trees(cache, torch.cat([IDS, IDS[:3]]), [TreeShape.chain(8), TreeShape.chain(3)])
    torch.testing.assert_close(rows, torch.cat([expected, expected[:3]]))
    torch.testing.assert_close(target.logits(expected), target.logits(expected[:, -target.hidden_size :]))


@pytest.mark.parametrize(
    ("shape", "plan"),
    [
        *[(shape, DYNAMIC) for shape in (*SHAPES, EAGLE, EAGLE3)],
        (SHAPES[2], TreePlan("chain", 4)), (EAGLE3, TreePlan("static", 4)),
    ],
    ids=str,
)  # fmt: skip
def test_answers_are_the_targets(shape, plan):
    model = drafting(shape, plan=plan)
    options = {"max_new_tokens": 24}
    plain = [model.generate(prompt, draft=False, **options) for prompt in PROMPTS]
    drafted = [model.generate(prompt, **options) for prompt in PROMPTS]
    together = model.generate_batch(PROMPTS, rows=3, **options)
    assert [one.token_ids for one in drafted] == [one.token_ids for one in plain]
    assert [one.token_ids for one in together] == [one.token_ids for one in plain]
    assert sum(one.stats.drafted for one in drafted) > 0
    exact = [model.generate(PROMPTS[0], draft=draft, exact=True, **options).token_ids for draft in (True, False)]
    assert exact[0] == exact[1]


@pytest.mark.parametrize("shape", [*SHAPES, EAGLE, EAGLE3], ids=str)
def test_a_batch_drafts_what_one_answer_would(shape):
    model = drafting(shape, plan=DYNAMIC)
    alone, together = ([One(model.drafter) for _ in PROMPTS] for _ in range(2))
    tokens = [model.target.tokenizer(prompt)["input_ids"] for prompt in PROMPTS]
    for one, other, ids in zip(alone, together, tokens, strict=True):
        states = model.target.prefill(torch.tensor([ids]), model.target.new_cache(1, 32))[0]
        one.begin(ids, states)
        other.begin(ids, states)
    drafts = model.drafter.draft([one.context for one in together], [20] * len(PROMPTS), model.plan)
    for one, draft in zip(alone, drafts, strict=True):
        expected = one.draft(20, model.plan)
        assert (draft.tokens, draft.parents) == (expected.tokens, expected.parents)
        assert draft.scores == pytest.approx(expected.scores, abs=1e-4)


def test_a_dialogue_goes_on_behind_kept_states():
    model = drafting(SHAPES[2], plan=DYNAMIC, prefix_cache=100)
    first = model.generate(PROMPTS[1], max_new_tokens=12)
    longer = [*model.target.tokenizer(PROMPTS[1])["input_ids"], *first.token_ids, 9, 12]
    text = " ".join(f"w{i}" for i in longer if i > 2)
    fresh = drafting(SHAPES[2], plan=DYNAMIC)
    again = model.generate(text, max_new_tokens=12)
    assert again.token_ids == fresh.generate(text, max_new_tokens=12).token_ids
    assert again.stats.drafted == fresh.generate(text, max_new_tokens=12).stats.drafted


def test_a_head_reads_its_own_of_more_layers():
    shape = {"kv_layers": (2,)}
    wide, narrow = tiny_target(state_layers=(1, 2)), tiny_target(state_layers=(2,))
    models = [
        Model(target, tiny_drafter(target, scale=LIVELY["beagle"], **shape), DYNAMIC) for target in (wide, narrow)
    ]
    first, second = (model.generate(PROMPTS[1], max_new_tokens=24) for model in models)
    assert first.stats.drafted == second.stats.drafted > 0


def test_a_target_without_the_layers_is_refused():
    with pytest.raises(BeagleError, match=r"reads layers 1, 2 of tiny-llama.*without 1, 2; load it with state_layers"):
        tiny_drafter(tiny_target(), kv_layers=(1, 2))


@pytest.mark.parametrize("layers", [(3,), (1, 7)], ids=str)
def test_layers_that_the_target_lacks_are_refused(layers):
    with pytest.raises(BeagleError, match=r"has 3 layers, of which 1 to 2 can be read"):
        tiny_target(state_layers=layers)


@pytest.mark.parametrize("settings", [{"kv_layers": (2, 1)}, {"kv_layers": (0,)}, {"blocks": 0}], ids=str)
def test_settings_that_cannot_be_are_refused(settings):
    with pytest.raises(ValueError, match=r"kv_layers|blocks"):
        replace(tiny_head(tiny_target()).config, **settings)


@pytest.mark.parametrize(("count", "layers"), [(30, (10, 20)), (28, (9, 18)), (3, (1, 2)), (2, (1,)), (1, ())])
@pytest.mark.parametrize("architecture", ["beagle", "eagle3"])
def test_layers_at_thirds_of_the_depth(count, layers, architecture):
    recipe = Recipe(head={"architecture": architecture, "kv_layers": "auto"})
    assert recipe.state_layers(count) == layers


def test_layers_that_are_chosen_are_those_of_the_head(tmp_path):
    (tmp_path / "recipe.yaml").write_text("head: {kv_layers: auto, blocks: 2}")
    recipe = read_recipe(tmp_path / "recipe.yaml")
    target = tiny_target(state_layers=recipe.state_layers(3))
    assert new_head(target, recipe.train, recipe.head).config.kv_layers == target.state_layers == (1, 2)
    (tmp_path / "recipe.yaml").write_text("head: {kv_layers: middle}")
    with pytest.raises(BeagleError, match=r"head\.kv_layers.*'middle'"):
        read_recipe(tmp_path / "recipe.yaml")


def test_a_checkpoint_brings_its_layers(folders, tmp_path):
    target = tiny_target(state_layers=(1, 2))
    head = tiny_head(target, kv_layers=(1, 2), blocks=2, scale=LIVELY["beagle"])
    save_head(head, tmp_path / "head", target="tiny", dtype=torch.float32, meta={})
    loaded = load_head(tmp_path / "head", target)
    assert loaded.config == head.config
    model = load(str(folders.target), draft=str(tmp_path / "head"), dtype="float32", device="cpu")
    assert model.target.state_layers == (1, 2)
    options = {"max_new_tokens": 24}
    assert (
        model.generate(PROMPTS[1], **options).token_ids == model.generate(PROMPTS[1], draft=False, **options).token_ids
    )


@pytest.mark.parametrize("shape", [SHAPES[2], EAGLE3], ids=str)
def test_captured_passes_and_drafts_are_the_eager_ones(shape):
    model, other = drafting(shape, plan=DYNAMIC), drafting(shape, plan=DYNAMIC)
    target = other.target
    target.use(Captured(target.base, target.hidden_size, target.layers, Recorder()))
    other.drafter.use(CapturedDraft(other.drafter.eager, other.drafter.rotations, Recorder()), "captured")
    first, second = (one.generate(PROMPTS[1], max_new_tokens=24) for one in (model, other))
    assert first.token_ids == second.token_ids
    assert first.stats.drafted == second.stats.drafted > 0


@pytest.mark.slow
@pytest.mark.parametrize("shape", [SHAPES[2], EAGLE3], ids=str)
def test_compiled_levels_are_the_eager_ones(shape, tmp_path):
    model, target = drafting(shape, plan=DYNAMIC), drafting(shape).target
    options = {"scale": SCALES[shape.get("architecture", "beagle")], **shape}
    build_levels(tmp_path, target, tiny_head(target, **options), "tiny")
    head = tiny_head(target, **options)
    levels = find_levels(tmp_path, target, head)
    assert levels is not None
    drafter = HeadDrafter(target, head)
    drafter.use(levels, "compiled")
    for prompt in PROMPTS[:2]:
        first, second = (one.generate(prompt, max_new_tokens=24) for one in (model, Model(target, drafter, DYNAMIC)))
        assert first.token_ids == second.token_ids
        assert first.stats.drafted == second.stats.drafted > 0
