"""Benchmarks of training. ``scaling.py``: parts of a store, the same held-out answers for all of them, and the report.

``ranks.py``: real runs, in one process and in two.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import sys
from pathlib import Path

import pytest
import torch
import yaml

from beagle.errors import BeagleError
from beagle.targets.loading import load_target
from beagle.training.answers import Sample
from beagle.training.config import TrainConfig
from beagle.training.data import samples
from beagle.training.states import Fingerprint, StateStore
from beagle.training.trainer import Trainer

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
RECIPE = {
    "answers": {"states": "live"},
    "train": {"early_epochs": 1.2, "late_epochs": 0.7, "window": 2, "steps": 2, "batch_tokens": 200, "warmup_steps": 1},
}


@pytest.fixture
def scaling(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))
    return importlib.import_module("scaling")


@pytest.fixture
def report(scaling):
    return importlib.import_module("scaling_report")


@pytest.fixture
def store(folders, tmp_path):
    """Ten shards of 16 answers."""
    target = load_target(str(folders.target), dtype="float32", device="cpu")
    store = StateStore(tmp_path / "data", Fingerprint.of(target, 20, 24), with_states=False)
    random = torch.Generator().manual_seed(0)
    for shard in range(10):
        names = [hashlib.sha256(f"{shard}/{i}".encode()).hexdigest()[:24] + "/0" for i in range(16)]
        store.write([Sample(n, torch.randint(3, target.vocab_size, (14,), generator=random), None, 3) for n in names])
    return store


def test_smaller_parts_lie_in_larger_ones_and_none_in_what_is_held_out(scaling, store):
    held = [s.id for group in scaling.held_out(store) for s in group]
    small, few = scaling.part_of(store, 300)
    large, more = scaling.part_of(store, 700)
    trained = [{s.id for s in samples(part.shards(), validation=False)} for part in (small, large)]
    assert len({name.partition("/")[0] for name in held}) > 1  # of several shards
    assert trained[0] < trained[1]
    assert not trained[1] & set(held)
    assert [few, more] == [10 * len(ids) for ids in trained]
    assert few - 160 < 300 <= few
    assert small.shards() != store.shards()[: len(small.shards())]  # what a store begins with may differ from its end
    with pytest.raises(BeagleError, match="give a smaller --run"):
        scaling.part_of(store, 1e6)


def test_passes_fall_with_size_and_stages_share_them(scaling):
    recipe = TrainConfig(early_epochs=1.2, late_epochs=0.7, batch_tokens=16384, regression=10.0)
    found = {size: scaling.settings(recipe, size, "paper") for size in (0.1, 0.5, 2, 8, 16)}
    passes = [c.early_epochs + c.late_epochs for c in found.values()]
    assert passes == sorted(passes, reverse=True)
    assert passes[-1] == pytest.approx(1.9)  # the recipe's own
    assert all(c.early_epochs / c.late_epochs == pytest.approx(1.2 / 0.7, rel=1e-3) for c in found.values())
    assert [c.batch_tokens for c in found.values()] == [4096, 4096, 16384, 16384, 16384]
    other = scaling.settings(recipe, 2, "tvce")
    assert (other.loss, other.cross_entropy_share, other.regression) == ("total_variation", 0.1, 0.0)


def test_runs_are_kept_and_scored_on_the_same_answers(scaling, report, store, folders, tmp_path, monkeypatch):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump(RECIPE))
    words = ["--data", str(store.folder), "--config", str(recipe), "--target", str(folders.target), "--device", "cpu"]
    words += ["--dtype", "bfloat16", "--vocabulary", "16", "--out", str(tmp_path / "runs"), "--run", "0.0003/paper"]
    scaling.main([*words, "--run", "0.0007/paper", "--run", "0.0003/lk", "--whole", str(folders.head)])
    monkeypatch.setattr(Trainer, "train", lambda *_, **__: pytest.fail("a finished run was trained again"))
    scaling.main(words)
    pytest.importorskip("matplotlib")
    report.main([str(tmp_path / "runs"), "--json", str(tmp_path / "scaling.json")])
    result = json.loads((tmp_path / "scaling.json").read_text())
    runs = result["runs"]
    assert [(run["loss"], run["answer_tokens"] < 500) for run in runs] == [
        ("paper", True),
        ("paper", False),
        ("lk", True),
    ]
    assert {(run["drafts"][0], run["held_out"]) for run in [*runs, result["whole"]]} == {
        (10 * runs[0]["held_out"], runs[0]["held_out"])
    }
    assert result["whole"]["answer_tokens"] > runs[1]["answer_tokens"]
    line = result["trends"]["step-α of the first draft"]["all"]
    for run in runs[:2]:  # two points: the line goes through both
        assert report.on_line(line, run["answer_tokens"]) == pytest.approx(run["step_alpha"][0], abs=1e-3)
    assert (tmp_path / "scaling.png").read_bytes().startswith(b"\x89PNG")


def test_runs_of_different_held_out_answers_are_no_series(report, tmp_path):
    for name, count in {"a": 10, "b": 20}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "record.json").write_text(json.dumps({"drafts": [count], "loss": "paper"}))
    with pytest.raises(BeagleError, match="different answers"):
        report.read_runs(tmp_path)
    with pytest.raises(BeagleError, match="no finished run"):
        report.read_runs(tmp_path / "a" / "none")


def test_trends_leave_out_other_losses_and_the_second_one_small_batches(report):
    runs = [
        {"loss": loss, "answer_tokens": tokens, "batch_tokens": batch, "step_alpha": [alpha], "expected_length": 2.0}
        for loss, tokens, batch, alpha in [
            ("paper", 1e5, 4096, 0.1), ("paper", 1e6, 16384, 0.5), ("paper", 1e7, 16384, 0.6), ("lk", 1e7, 16384, 0.9)
        ]
    ]  # fmt: skip
    found = report.trends(runs)["step-α of the first draft"]
    assert found["all"]["per_decade"] == pytest.approx(0.25)
    assert found["large"]["per_decade"] == pytest.approx(0.1)
    assert report.on_line(found["large"], 1e8) == pytest.approx(0.7)
    assert found["all"]["largest_miss"] == pytest.approx(0.1)


@pytest.mark.slow
def test_one_process_and_two_ranks_train_on_the_same_store(scaling, store, folders, tmp_path, monkeypatch, capsys):
    """The recipe's own batch and held-out answers are not those of the runs."""
    recipe, out = tmp_path / "recipe.yaml", tmp_path / "out.json"
    train = RECIPE["train"] | {"batch_tokens": 16384, "validation_samples": 50}
    answers = RECIPE["answers"] | {"max_prompt_tokens": 20, "max_new_tokens": 24}
    recipe.write_text(yaml.safe_dump({"answers": answers, "train": train}))
    words = ["--target", folders.target, "--data", store.folder, "--config", recipe, "--batch-tokens", 100]
    words += ["--seconds", 1, "--repeats", 1, "--json", out]
    monkeypatch.setattr(sys, "argv", ["ranks.py", *map(str, words)])
    importlib.import_module("ranks").main()
    result = json.loads(out.read_text())
    (alone,), (together,) = result["runs"]["one process"], result["runs"]["two ranks"]
    for run in (alone, together):
        assert 0 < run["trained_tokens"] <= 100 * run["steps"]
    assert result["two_ranks_over_one"] > 0
    assert str(tmp_path) not in out.read_text()
