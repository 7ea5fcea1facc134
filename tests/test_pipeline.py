"""``beagle train``: from prompts to a head, resumed, refused, interrupted."""

from __future__ import annotations

import functools
import json
import shutil
import signal
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from beagle.errors import BeagleError
from beagle.training import states
from beagle.training.answers import AnswerGenerator
from beagle.training.recipe import Recipe, read_recipe
from training_runs import COUNT, interrupt_after, stored

HEADS = [{"newest_state": "scale"}, {"architecture": "eagle"}]


def same_weights(one, other):
    first, second = (load_file(folder / "model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[k], second[k]) for k in first)


@pytest.mark.parametrize("head", HEADS, ids=str)
def test_whole_run_leaves_a_usable_head(train, folders, beagle, losses, tmp_path, head):
    out = tmp_path / "deep" / "run"
    ended = train(out, head=head)
    assert ended.code == 0, ended.err
    assert "draft head written" in ended.err
    assert len(stored(out)) == COUNT
    about = json.loads((out / "result.json").read_text())
    assert about["steps"] == len(losses) > 6
    assert about["stored_tokens"] == sum(map(len, stored(out).values()))
    assert len(about["validation_step_alpha"]) == 5
    assert about["recipe"]["train"]["learning_rate"] == 0.01
    assert {"date", "machine", "versions", "revision", "target"} <= set(about)
    assert losses[-1] < losses[0]
    config = json.loads((out / "head" / "config.json").read_text())
    assert config["model_type"] == head.get("architecture", "beagle")
    options = ["--target", folders.target, "--dtype", "float32", "-n", 16, "-q"]
    drafted = beagle("generate", "w3 w4", *options, "--draft", out / "head")
    assert drafted.code == 0
    assert drafted.out == beagle("generate", "w3 w4", *options, "--draft", "none").out


def test_same_command_again_changes_nothing(train, losses, tmp_path):
    assert train(tmp_path / "run").code == 0
    shutil.copytree(tmp_path / "run", tmp_path / "before")
    count = len(losses)
    assert train(tmp_path / "run").code == 0
    assert len(losses) == count
    assert stored(tmp_path / "run") == stored(tmp_path / "before")
    assert same_weights(tmp_path / "run" / "head", tmp_path / "before" / "head")
    assert (tmp_path / "run" / "log.csv").read_text() == (tmp_path / "before" / "log.csv").read_text()


def test_answers_serve_another_run(train, folders, beagle, tmp_path):
    assert train(tmp_path / "run").code == 0
    options = ["--config", tmp_path / "recipe.yaml", "--target", folders.target, "--data", tmp_path / "run" / "data"]
    assert beagle("train", "--out", tmp_path / "other", *options).code == 0
    assert same_weights(tmp_path / "run" / "head", tmp_path / "other" / "head")
    assert not (tmp_path / "other" / "data").exists()


def test_live_states_train_like_stored_ones(train, losses, tmp_path):
    ended = train(tmp_path / "disk")
    assert "states: 0.06 GB per million tokens at width 32 (answers.states: live stores none)" in ended.err
    disk = losses.copy()
    losses.clear()
    ended = train(tmp_path / "live", answers={"states": "live"})
    assert "states: computed live" in ended.err
    assert stored(tmp_path / "live") == stored(tmp_path / "disk")
    shards = [next((tmp_path / kind / "data").glob("shard-*")) for kind in ("disk", "live")]
    assert ["states" in states.read_shard(path) for path in shards] == [True, False]
    assert losses == pytest.approx(disk, abs=0.02)  # stored states are rounded to bfloat16


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "head", "how"),
    [
        (0, HEADS[0], signal.SIGINT),
        (6, HEADS[0], signal.SIGTERM),
        (17, HEADS[0], signal.SIGINT),
        (17, HEADS[1], signal.SIGINT),
    ],
)
def test_interrupted_training_goes_on(train, tmp_path, monkeypatch, steps, head, how):
    before = signal.getsignal(signal.SIGTERM)
    train = functools.partial(train, head=head)
    assert train(tmp_path / "whole").code == 0
    with monkeypatch.context() as patched:
        interrupt_after(patched, steps, how)
        ended = train(tmp_path / "run")
    assert ended.code == 130
    assert signal.getsignal(signal.SIGTERM) == before
    assert "run the same command again" in ended.err
    assert "Traceback" not in ended.err
    assert (tmp_path / "run" / "checkpoint.safetensors").is_file()
    assert not (tmp_path / "run" / "head").exists()
    assert train(tmp_path / "run").code == 0
    assert same_weights(tmp_path / "run" / "head", tmp_path / "whole" / "head")


def test_stopped_by_the_clock_goes_on(train, losses, tmp_path):
    assert train(tmp_path / "whole").code == 0
    count = len(losses)
    assert train(tmp_path / "run", "--seconds", 0).code == 0
    assert len(losses) == count + 1
    assert train(tmp_path / "run").code == 0
    assert losses[count:] == losses[:count]
    assert same_weights(tmp_path / "run" / "head", tmp_path / "whole" / "head")


def test_interrupted_answers_go_on(train, tmp_path, monkeypatch):
    assert train(tmp_path / "whole").code == 0
    run = AnswerGenerator.run

    def interrupted(self, prompts):
        for i, sample in enumerate(run(self, prompts)):
            if i == 3:
                raise KeyboardInterrupt
            yield sample

    with monkeypatch.context() as patched:
        patched.setattr(AnswerGenerator, "run", interrupted)
        assert train(tmp_path / "run").code == 130
    assert len(stored(tmp_path / "run")) == 3
    assert train(tmp_path / "run").code == 0
    assert stored(tmp_path / "run") == stored(tmp_path / "whole")


def test_limits(train, tmp_path):
    assert train(tmp_path / "few", "--limit", 5, "--seconds", 0).code == 0
    assert len(stored(tmp_path / "few")) == 5
    assert train(tmp_path / "short", "--max-tokens", 60, "--seconds", 0).code == 0
    lengths = [len(tokens) for tokens in stored(tmp_path / "short").values()]
    assert 60 <= sum(lengths) < 60 + 44


def test_full_disk_is_refused_beforehand(train, tmp_path, monkeypatch):
    """Tokens alone fit (8 bytes each), their states (2 x 32 bytes more) do not."""
    free = 1_000_000_000 + 44 * COUNT * 30
    monkeypatch.setattr(states.shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    train(tmp_path / "disk").refusal(tmp_path / "disk", "free", "max_tokens")
    assert stored(tmp_path / "disk") == {}
    assert train(tmp_path / "live", "--seconds", 0, answers={"states": "live"}).code == 0


def test_bad_input_is_refused(train, folders, beagle, tmp_path):
    (tmp_path / "file").write_text("")
    for out in (tmp_path / "file", tmp_path / "file" / "run"):
        train(out).refusal(out, "--out")
    train(tmp_path / "run", "--prompts", tmp_path / "missing.jsonl").refusal("missing.jsonl")
    train(tmp_path / "run", "--config", tmp_path / "missing.yaml").refusal("missing.yaml")
    train(tmp_path / "run", "--target", "nowhere").refusal("nowhere")
    train(tmp_path / "run", train={"stpes": 3}).refusal("recipe.yaml", "stpes", "window")
    beagle("train", "-o", tmp_path / "none", "-t", folders.target).refusal(tmp_path / "none", "--prompts")


def test_other_settings_are_refused(train, tmp_path):
    assert train(tmp_path / "run", "--seconds", 0).code == 0
    train(tmp_path / "run", train={"noise": 0.1}).refusal(tmp_path / "run", "other settings")
    train(tmp_path / "run", answers={"max_new_tokens": 25}).refusal("max_new_tokens 24", "25")
    manifest = tmp_path / "run" / "data" / "manifest.json"
    for key, value in (("weights", "another"), ("template", "0123456789abcdef")):
        kept = manifest.read_text()
        manifest.write_text(json.dumps({**json.loads(kept), key: value}))
        train(tmp_path / "run").refusal(tmp_path / "run" / "data", f"{key} '{value}'", "another folder")
        manifest.write_text(kept)


@pytest.mark.parametrize(
    ("text", "word"),
    [("a: [1", "recipe.yaml"), ("- 1", "mapping"), ("trian: {}", "trian"), ("answers: {row: 1}", "row"),
     ("train: {noise: much}", "much"), ("train: 3", "recipe.yaml"), ("head: [a]", "recipe.yaml"),
     ("train: {window: 2, steps: 3}", "window"), ("answers: {rows: 0}", "rows"), ("answers: {states: dsik}", "states"),
     ("head: {newest_state: foo}", "newest_state"), ("head: {num_kv_heads: few}", "num_kv_heads"),
     ("head: {num_kv_heads: {a: 1}}", "num_kv_heads"), ("head: {architecture: hawk}", "beagle, eagle"),
     ("head: {architecture: [eagle]}", "beagle, eagle"), ("head: {architecture: eagle, concat: no}", "for eagle"),
     ("head: {draft_vocab_size: 9}", "draft_vocab_size"), ("train: {late_loss: window}", "late_loss"),
     ("head: {newest_state: linear}", "newest_state")],
)  # fmt: skip
def test_bad_recipes(tmp_path, text, word):
    path = tmp_path / "recipe.yaml"
    path.write_text(text)
    with pytest.raises(BeagleError, match=word):
        read_recipe(path)


def test_empty_recipe_and_shipped_recipes(tmp_path, request):
    (tmp_path / "recipe.yaml").write_text("train:\n")
    assert read_recipe(tmp_path / "recipe.yaml") == Recipe()
    found = list((request.config.rootpath / "configs").glob("*.yaml"))
    assert found
    assert all(isinstance(read_recipe(path).train.learning_rate, float) for path in found)


def test_the_rivals_recipe_differs_in_its_head_alone(request):
    ours, rival = (
        read_recipe(request.config.rootpath / "configs" / f"smollm2-135m{kind}.yaml") for kind in ("", "-eagle")
    )
    assert (rival.answers, rival.train) == (ours.answers, ours.train)
    assert rival.head == {"architecture": "eagle"}


def test_training_on_a_quantised_target(train, tmp_path):
    """Its states are told from the plain target's."""
    out = tmp_path / "run"
    ended = train(out, "--quantize", "int8")
    assert ended.code == 0, ended
    assert json.loads((out / "data" / "manifest.json").read_text())["quantize"] == "int8"
    assert json.loads((out / "result.json").read_text())["target"]["quantize"] == "int8"
    train(out).refusal("quantize 'int8', not None")
