"""``beagle train --init``: from another head's weights, of the same shape."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from beagle.drafters.checkpoint import load_head, save_head
from beagle.errors import BeagleError
from beagle.training.data import frequent_tokens
from beagle.training.states import StateStore
from beagle.training.trainer import Trainer
from conftest import tiny_head, tiny_target

NONE = {"early_epochs": 0, "late_epochs": 0.01}  # a single step
STILL = {**NONE, "learning_rate": 1e-12, "weight_decay": 0.0}


@pytest.fixture
def head(tmp_path):
    """A head of settings that no recipe here has, with a trimmed vocabulary."""
    target = tiny_target()
    head = tiny_head(target, newest_state="none", num_kv_heads=2, draft_vocab_size=20, seed=5)
    head.draft_vocab.copy_(torch.arange(40, 60))
    save_head(head, tmp_path / "other", target="tiny", dtype=torch.float32, meta={})
    return tmp_path / "other"


def weights(folder):
    return load_file(folder / "model.safetensors")


def test_the_head_starts_from_the_other_ones_weights(train, head, tmp_path):
    ended = train(tmp_path / "run", "--init", head, train=STILL)
    assert ended.code == 0, ended.err
    before, after = weights(head), weights(tmp_path / "run" / "head")
    assert before.keys() == after.keys()
    for name in before.keys() - {"draft_vocab"}:
        assert torch.equal(before[name].bfloat16(), after[name]), name
    config = json.loads((tmp_path / "run" / "head" / "config.json").read_text())["head"]
    assert (config["newest_state"], config["num_kv_heads"]) == ("none", 2)
    started = json.loads((tmp_path / "run" / "result.json").read_text())["init"]
    assert (started["head"], started["tau"]) == ("other", None)  # no answer is held out


def test_the_other_heads_acceptance_stands_beside_the_new_ones(train, head, prompts, tmp_path):
    rows = [{"prompt": f"w{3 + i % 60} w{3 + (7 * i) % 60}"} for i in range(120)]
    prompts.write_text("".join(json.dumps(row) + "\n" for row in rows))
    ended = train(tmp_path / "run", "--init", head, train=STILL)
    assert ended.code == 0, ended.err
    result = json.loads((tmp_path / "run" / "result.json").read_text())
    assert result["init"]["tau"] >= 1
    assert f"on held-out prompts: {result['init']['tau']:.2f}" in " ".join(ended.err.split())
    assert result["served"]["prompts"] > 0


@pytest.mark.parametrize("size", [None, 12])
def test_the_draft_vocabulary_is_the_new_answers(train, head, tmp_path, size):
    ended = train(tmp_path / "run", "--init", head, train={**STILL, "draft_vocab_size": size})
    assert ended.code == 0, ended.err
    found = weights(tmp_path / "run" / "head")["draft_vocab"].tolist()
    if size is None:
        assert found == list(range(64))
    else:
        store = StateStore.existing(tmp_path / "run" / "data")
        assert found == frequent_tokens(store, size, 64, [2]).tolist()
        assert len(found) == size


def test_training_from_a_trained_head_goes_on_where_it_ended(train, losses, tmp_path):
    assert train(tmp_path / "first").code == 0
    first = losses.copy()
    losses.clear()
    ended = train(tmp_path / "second", "--init", tmp_path / "first" / "head", "--data", tmp_path / "first" / "data")
    assert ended.code == 0, ended.err
    assert len(losses) == len(first)
    assert all(now < before for now, before in zip(losses, first, strict=True))  # of the same batches


def test_a_resumed_run_keeps_what_it_has_learned(train, head, tmp_path):
    assert train(tmp_path / "whole", "--init", head).code == 0
    assert train(tmp_path / "run", "--init", head, "--seconds", 0).code == 0
    assert train(tmp_path / "run", "--init", head).code == 0
    one, other = weights(tmp_path / "whole" / "head"), weights(tmp_path / "run" / "head")
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_another_start_is_refused(train, head, tmp_path):
    assert train(tmp_path / "run", "--init", head, "--seconds", 0).code == 0
    train(tmp_path / "run").refusal("run", "settings")  # the shape is another one already
    save_head(
        load_head(head, tiny_target()).requires_grad_(False),
        tmp_path / "same",
        target="tiny",
        dtype=torch.float16,
        meta={},
    )
    ended = train(tmp_path / "run", "--init", tmp_path / "same", "--seconds", 0)
    ended.refusal("started from other", "start from the same")


def test_the_shipped_head_is_a_start():
    from beagle.training.recipe import Recipe
    from beagle.training.start import find_start, with_shape_of

    folder = find_start("head", "smollm2-135m")
    assert folder == find_start("auto", "smollm2-135m") == find_start("head+lookup", "smollm2-135m")
    recipe = with_shape_of(Recipe(), folder)
    assert recipe.head["architecture"] == "beagle"
    target = SimpleNamespace(
        ranks=SimpleNamespace(count=1),
        hidden_size=576, vocab_size=49152, name="t", device="cpu", dtype=torch.float32,
        layers=SimpleNamespace(heads=[9], shapes=[SimpleNamespace(key_dim=64)]), config=SimpleNamespace(), layer_count=30,
    )  # fmt: skip
    from beagle.training.trainer import new_head

    shapes = {k: v.shape for k, v in new_head(target, recipe.train, recipe.head).state_dict().items()}
    assert shapes.keys() == weights(folder).keys()
    assert all(shapes[k] == v.shape for k, v in weights(folder).items() if k != "draft_vocab")


def test_layers_that_a_recipe_leaves_open_are_those_of_the_start(tmp_path):
    from beagle.training.recipe import Recipe
    from beagle.training.start import with_shape_of

    recipe = Recipe(head={"kv_layers": "auto"})
    save_head(
        tiny_head(tiny_target(state_layers=(2,)), kv_layers=(2,)), tmp_path, target="t", dtype=torch.float32, meta={}
    )
    assert with_shape_of(recipe, tmp_path).head["kv_layers"] == (2,)
    save_head(tiny_head(tiny_target()), tmp_path, target="t", dtype=torch.float32, meta={})
    with pytest.raises(BeagleError, match=r"kv_layers of its head is \(\).*'auto'"):
        with_shape_of(recipe, tmp_path)


def test_bad_starts_are_refused_before_anything_is_answered(train, head, tmp_path, monkeypatch):
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("trained"))
    out = tmp_path / "run"
    train(out, "--init", tmp_path / "nowhere").refusal("nowhere", "no such folder")
    train(out, "--init", "lookup").refusal("init 'lookup'", "names no head")
    train(out, "--init", head, head={"newest_state": "scale"}).refusal("newest_state", "'none'", "'scale'", "other")
    train(out, "--init", head, head={"architecture": "eagle"}).refusal("architecture", "beagle", "eagle")
    wide = tiny_target(hidden_size=40)
    save_head(tiny_head(wide), tmp_path / "wide", target="wide", dtype=torch.float32, meta={})
    train(out, "--init", tmp_path / "wide").refusal("hidden size 40", "hidden size 32")
    (head / "model.safetensors").write_bytes(b"no weights")
    train(out, "--init", head).refusal("model.safetensors is corrupt")
    assert not (out / "data").exists()
