"""``beagle research compare``: equal budgets, kept runs, its files, and what stops it."""

from __future__ import annotations

import csv
import json
import mmap
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from functools import partial
from itertools import count
from types import SimpleNamespace

import pytest
import torch
import yaml

from beagle.errors import BeagleError
from beagle.research.compare import run_variants, train_variant
from beagle.research.compare.memory_meter import MemoryMeter
from beagle.research.compare.results import Entry, entries, growth, reached
from beagle.research.compare.suites import SUITES
from beagle.research.compare.variants import parse, parse_list
from beagle.research.training_log import expected_length
from beagle.training import trainer
from beagle.training.answers import AnswerGenerator
from beagle.training.config import TrainConfig
from beagle.training.data import batches, samples
from beagle.training.prompts import Prompt
from beagle.training.recipe import AnswerConfig, Recipe, read_recipe
from beagle.training.states import Fingerprint, StateStore
from conftest import tiny_model, tiny_target, tiny_tokenizer

TRAIN = {
    "early_epochs": 2, "late_epochs": 1, "window": 3, "steps": 2, "batch_tokens": 120, "learning_rate": 1e-2,
    "warmup_steps": 2, "schedule": "cosine", "noise": 0.05, "validate_every": 3, "checkpoint_every": 4,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """A saved tiny target, its answers on disk, a recipe, and questions."""
    root = tmp_path_factory.mktemp("made")
    tiny_model().save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    target = tiny_target()
    target.eos_ids, target.name = frozenset(), str(root / "target")
    store = StateStore(root / "data", Fingerprint.of(target, 20, 24, "files"))
    prompts = [Prompt(str(i), (" ".join(f"w{3 + (5 * i + j * j) % 60}" for j in range(1 + i % 5)),)) for i in range(12)]
    store.write(
        AnswerGenerator(target, AnswerConfig(rows=4, max_prompt_tokens=20, max_new_tokens=24, sampled_share=0)).run(
            prompts
        )
    )
    (root / "recipe.yaml").write_text(yaml.safe_dump({"train": TRAIN, "head": {"newest_state": "scale"}}))
    (root / "few.jsonl").write_text('{"prompt": "w3 w4"}\n{"prompt": "w9"}\n')
    return root


@pytest.fixture
def here(monkeypatch):
    """Variants train in this process; what was trained is listed."""
    trained = []

    def run(work, *arguments):
        if work is train_variant.train_variant:
            trained.append((arguments[0].variant, arguments[0].seed))
        return work(*arguments)

    monkeypatch.setattr(run_variants, "in_fresh_process", run)
    return trained


@pytest.fixture
def compare(beagle, made, tmp_path):
    def call(*extra, out="out", budget=("--tokens", 500), data=made / "data"):
        options = ["--config", made / "recipe.yaml", "--target", made / "target", "--device", "cpu"]
        return beagle("research", "compare", "--data", data, "--out", tmp_path / out, *options, *budget, *extra)

    return call


def figures(folder):
    return json.loads((folder / "compare.json").read_text())


@pytest.mark.slow
def test_equal_tokens_and_all_files(compare, here, made, tmp_path):
    names = ["beagle-early", "beagle", "beagle-window", "eagle", "eagle-u3"]
    options = [
        "--variants",
        ",".join(names),
        "--seeds",
        "0,1",
        "--questions",
        made / "few.jsonl",
        "-n",
        6,
        "--nodes",
        4,
    ]
    ended = compare(*options)
    assert ended.code == 0, ended.err
    assert here == [(name, seed) for seed in (0, 1) for name in names]
    result = figures(tmp_path / "out")
    for seed in (0, 1):
        alike = [r for r in result["runs"] if r["seed"] == seed]
        assert len({(r["tokens"], r["trained_steps"]) for r in alike}) == 1
        assert alike[0]["tokens"] >= 500 > alike[0]["tokens"] - 120  # the first step that reaches the budget
    assert {r["variant"]: list(r["stages"]) for r in result["runs"]} == {
        name: ["early"] if name in ("beagle-early", "eagle") else ["early", "late"] for name in names
    }
    for record in result["runs"]:
        assert record["parameters"] == pytest.approx((record["bytes"] - 2000) / 2, rel=0.2)  # bf16
        assert sum(s["tokens"] for s in record["stages"].values()) == record["tokens"]
        assert all(s["seconds_per_million_tokens"] > 0 for s in record["stages"].values())
        last = record["curve"][-1]
        assert (last["step"], last["tokens"]) == (record["trained_steps"], record["tokens"])
        assert last["step_alpha"] == pytest.approx(record["step_alpha"], abs=1e-4)
    assert set(result["decoding"]["dynamic"]) == {f"{name}/seed{seed}" for name in names for seed in (0, 1)}
    assert result["decoding"]["plain"]["plain"]["tau"] == 1
    meta = result["meta"]
    assert {"date", "machine", "versions", "revision", "command", "arguments", "target", "data"} <= set(meta)
    rows = list(csv.DictReader((tmp_path / "out" / "compare.csv").open()))
    assert [(r["variant"], int(r["seed"])) for r in rows] == [(name, seed) for name in names for seed in (0, 1)]
    points = list(csv.DictReader((tmp_path / "out" / "curves.csv").open()))
    assert len(points) == sum(len(r["curve"]) for r in result["runs"])
    page = (tmp_path / "out" / "compare.md").read_text()
    assert all(f"| {name} |" in page for name in names)
    for plot in ("step_alpha", "curves"):
        assert f"({plot}.png)" in page
        for kind, start in (("png", b"\x89PNG"), ("svg", b"<?xml")):
            assert (tmp_path / "out" / f"{plot}.{kind}").read_bytes().startswith(start)

    ended = compare(*options[:-6], "--seeds", "0,1,2")  # finished runs are kept, another seed is added
    assert ended.code == 0, ended.err
    assert here[10:] == [(name, 2) for name in names]
    assert ended.err.count(": kept") == 10


def test_interrupted_comparison_goes_on_where_it_stopped(compare, here, tmp_path, monkeypatch):
    options = ["--variants", "beagle,eagle"]
    assert compare(*options, out="whole").code == 0
    first = here.copy()
    ordinary = train_variant.Measured._one

    def interrupted(self, group):
        if self.head.architecture == "eagle" and self.step == 5:
            raise KeyboardInterrupt
        return ordinary(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(train_variant.Measured, "_one", interrupted)
        ended = compare(*options)
        assert ended.code == 130
        assert "run the same command again" in ended.err
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(train_variant.Measured, "_one", lambda self, g: seen.append(self.step) or ordinary(self, g))
        assert compare(*options).code == 0
    assert here == [*first, *first, ("eagle", 0)]
    assert seen[0] == 5
    whole, resumed = (figures(tmp_path / out)["runs"] for out in ("whole", "out"))
    for a, b in zip(whole, resumed, strict=True):
        assert (a["step_alpha"], a["tokens"]) == (b["step_alpha"], b["tokens"])
        assert {n: s["tokens"] for n, s in a["stages"].items()} == {n: s["tokens"] for n, s in b["stages"].items()}


def test_equal_seconds(compare, here, tmp_path, monkeypatch):
    clock, step = count(0.0, 0.02), 0.02  # two readings a step
    monkeypatch.setattr(trainer, "time", SimpleNamespace(perf_counter=lambda: next(clock)))
    ended = compare("--variants", "beagle,eagle", budget=("--seconds", 0.4))
    assert ended.code == 0, ended.err
    for record in figures(tmp_path / "out")["runs"]:
        assert 0.4 - step / 2 < record["seconds"] < 0.4 + 1.5 * step
        stages = {name: stage["tokens"] / stage["tokens_per_second"] for name, stage in record["stages"].items()}
        assert sum(stages.values()) == pytest.approx(record["seconds"], abs=step)  # rates are rounded
        assert list(stages) == (["early"] if record["variant"] == "eagle" else ["early", "late"])
        if "late" in stages:
            assert stages["early"] == pytest.approx(0.4 * 2 / 3, abs=1.5 * step)  # the recipe's two of three epochs
    assert compare("--variants", "beagle", budget=("--seconds", 0.4)).code == 0
    assert here == [("beagle", 0), ("eagle", 0)]


@pytest.mark.slow
def test_a_fresh_process_measures_its_own_memory(compare, tmp_path):
    ended = compare("--variants", "beagle", budget=("--tokens", 200))
    assert ended.code == 0, ended.err
    (record,) = figures(tmp_path / "out")["runs"]
    assert all(0 < stage["memory_mb"] < 500 for stage in record["stages"].values())


def test_memory_is_the_median_of_the_seeds():
    """One process in three has a heap with holes."""
    stages = [{"early": {"memory_mb": 90.0}, "late": {"memory_mb": peak}} for peak in (100.0, 180.0, 104.0)]
    assert Entry("beagle", [{"stages": of} for of in stages]).memory_mb() == 104.0


def test_data_of_another_kind_or_changed_meanwhile_is_refused(compare, here, made, tmp_path, monkeypatch):
    shutil.copytree(made / "data", tmp_path / "data")
    manifest = tmp_path / "data" / "manifest.json"
    content = json.loads(manifest.read_text())
    manifest.write_text(json.dumps({**content, "template": "another"}))
    compare(data=tmp_path / "data").refusal("template 'another'", "another folder")
    manifest.write_text(json.dumps(content))
    specs = run_variants.specs

    def then_changed(*arguments):
        planned = specs(*arguments)
        (shard,) = StateStore.existing(tmp_path / "data").shards()
        shutil.copy(shard, shard.with_name("shard-00001.safetensors"))
        return planned

    monkeypatch.setattr(run_variants, "specs", then_changed)
    compare(data=tmp_path / "data").refusal("has changed")


def test_memory_meter_counts_what_pieces_held():
    meter = MemoryMeter(torch.device("cpu"))
    with meter.piece():
        held = torch.ones(40 * 2**18)  # 40 MB
        del held
    assert 35 < meter.peak < 80
    with mmap.mmap(-1, 80 * 2**20) as outside:  # given back for certain, which malloc may put off
        torch.frombuffer(outside, dtype=torch.uint8).fill_(1)
    with meter.piece():
        pass
    assert meter.peak < 80


def test_bad_input_is_one_line(compare, beagle, here, made, tmp_path):
    compare("--variants", "beagle,hawk").refusal("hawk", "beagle or eagle")
    compare("--variants", "beagle-q3").refusal("q3", "kN")
    compare("--variants", "eagle-s2").refusal("s2", "uN")
    compare("--variants", "beagle-k2-s3").refusal("3 steps", "k at least")
    compare("--variants", "beagle,beagle").refusal("twice")
    compare("--variants", ",").refusal("variants is empty")
    compare("--suite", "fig99").refusal("fig99", "fig4")
    compare("--suite", "fig11").refusal("fig11", "--questions")
    compare("--suite", "fig4", "--variants", "beagle").refusal("--suite")
    compare("--seeds", "0,x").refusal("--seeds", "0,1")
    compare(budget=()).refusal("--tokens N", "--seconds N")
    compare(data=tmp_path / "nowhere").refusal(tmp_path / "nowhere", "beagle train --prompts")
    assert here == []
    assert compare("--variants", "beagle-early", budget=("--tokens", 1)).code == 0
    compare("--variants", "beagle-early", budget=("--tokens", 400)).refusal("another budget", "another folder")


def test_every_suite_judges_what_it_trains(made, tmp_path):
    """Every variant parses, fits the shipped recipes, and every finding can be made."""
    recipe = Recipe(train=TrainConfig(window=3, steps=3))
    for name, suite in SUITES.items():
        found = {}
        for i, variant in enumerate(parse_list(suite.variants)):
            train, head = variant.settings(recipe, 7)
            assert (train.seed, train.early_epochs + train.late_epochs) == (7, 1)
            assert train.steps <= train.window
            cost = {"memory_mb": 100.0 + i, "tokens_per_second": 10.0}
            stages = {s: cost for s, there in (("early", variant.early), ("late", variant.late)) if there}
            alphas = [0.5 - 0.01 * i] * 5
            record = {
                "stages": stages, "step_alpha": alphas, "expected_length": expected_length(alphas), "seed": 7,
                "parameters": 10, "seconds": 9, "curve": [{"seconds": 5, "expected_length": 3.0, "step_alpha": alphas}], "variant": variant.name,
            }  # fmt: skip
            trees = {tree: [{"tau": 2.0 - 0.1 * i, "tokens_per_second": 30.0 - i}] for tree in suite.trees}
            found[variant.name] = Entry(variant.name, [record], trees)
            assert head["architecture"].removesuffix("-ablated") == variant.architecture
        assert suite.judge(found), name


def test_positions_that_few_drafts_reached_are_left_out_of_tables_and_verdicts():
    def entry(name, alphas, tried):
        record = {"step_alpha": alphas, "tried": tried, "curve": [], "seed": 0, "expected_length": 1.5}
        return Entry(name, [record])

    few = entry("beagle-early", [0.5, 0.4, 0.3, 0.0, 0.0], [900, 450, 180, 49, 3])
    many = entry("eagle", [0.5, 0.3, 0.2, 0.1, 0.1], [900, 450, 135, 50, 50])
    assert (few.depth, many.depth, few.alphas) == (3, 5, "0.50 0.40 0.30 - -")
    assert Entry("", [few.records[0], many.records[0]]).depth == 3  # of the seeds, the worst
    assert Entry("", [{"step_alpha": [0.1] * 5}]).depth == 5  # written by an older version
    above, _ = SUITES["fig3"].judge({"beagle-early": few, "eagle": many})
    assert above.agrees
    assert "α_2 … α_3" in above.found


def test_variants_are_what_their_names_say():
    recipe = Recipe(
        train=TrainConfig(window=3, steps=2, regression=0.5), head={"newest_state": "none", "num_kv_heads": 2}
    )
    train, head = parse("beagle-s8").settings(recipe, 0)
    assert (train.window, train.steps, train.early_epochs) == (8, 8, 0.5)
    assert head == {"architecture": "beagle", "newest_state": "none", "num_kv_heads": 2}
    train, head = parse("eagle-u8").settings(recipe, 0)
    assert (train.steps, train.early_epochs, head) == (8, 0.5, {"architecture": "eagle", "num_kv_heads": 2})
    assert parse("eagle").settings(recipe, 0)[0].early_epochs == 1
    assert parse("beagle-late-k4-s4").settings(recipe, 0)[0].early_epochs == 0
    train, head = parse("beagle-early-k1-random-noreg-noconcat").settings(recipe, 0)
    assert (train.window, train.steps, train.regression) == (1, 1, 0)
    assert (head["architecture"], head["early_mask"], head["concat"]) == ("beagle-ablated", "random", False)
    own = Recipe(train=TrainConfig(window=3, steps=2, early_window=1))
    windows = {
        name: parse(name).settings(own, 0)[0]
        for name in ("beagle-s4", "beagle-k2", "beagle-random", "beagle-onewindow")
    }
    assert {name: (t.early_window, t.window) for name, t in windows.items()} == {
        "beagle-s4": (1, 4), "beagle-k2": (None, 2), "beagle-random": (None, 3), "beagle-onewindow": (None, 3),
    }  # fmt: skip
    assert parse("beagle-k3").plain_name(own) == "beagle-k3"
    assert parse("beagle-kv3-linear").settings(recipe, 0)[1] == {
        "architecture": "beagle-ablated",
        "newest_state": "scale",
        "newest_through_matrix": True,
        "num_kv_heads": 3,
    }
    assert parse("eagle3-m20").settings(recipe, 0)[1]["intermediate_size"] == 2560
    assert [v.name for v in parse_list("beagle, eagle-u1..u3")] == ["beagle", "eagle-u1", "eagle-u2", "eagle-u3"]


def test_budget_in_steps_survives_the_trainers_rounding(made):
    store = StateStore.existing(made / "data")
    sizes = [sum(len(s.tokens) for s in g) for e in (0, 1) for g in batches(store, tokens=120, seed=3, epoch=e)]
    epoch = sum(1 for _ in batches(store, tokens=120, seed=3, epoch=0))
    steps, per_epoch = run_variants.steps_for(store, 120, 3, sum(sizes[:epoch]) + 1)
    assert (steps, per_epoch) == (epoch + 1, epoch)
    recipe = read_recipe(made / "recipe.yaml")
    for steps in range(1, 40):
        train = run_variants.in_steps(replace(recipe.train, early_epochs=2 / 3, late_epochs=1 / 3), steps, per_epoch)
        early = round(train.early_epochs * per_epoch)
        assert early == round(steps * 2 / 3)
        assert early + round(train.late_epochs * per_epoch) == steps


def test_a_run_older_than_an_option_is_kept(compare, here, tmp_path):
    options = ["--variants", "beagle-early"]
    assert compare(*options).code == 0
    path = tmp_path / "out" / "runs" / "beagle-early" / "seed0" / "result.json"
    record = json.loads(path.read_text())
    del record["settings"]["train"]["validation_samples"]
    path.write_text(json.dumps(record))
    assert compare(*options).code == 0
    assert here == [("beagle-early", 0)]
    record["settings"]["train"]["validation_samples"] = 3  # but not one with another value
    path.write_text(json.dumps(record))
    compare(*options).refusal("another budget")


def test_batch_sizes_have_equal_tokens(compare, here, tmp_path):
    assert compare("--variants", "beagle-early-b4,beagle-early-b16,beagle-early-b32").code == 0
    small, middle, large = figures(tmp_path / "out")["runs"]
    assert small["trained_steps"] > middle["trained_steps"] > large["trained_steps"]
    assert all(500 <= run["tokens"] < 500 + 240 for run in (small, middle, large))
    assert (tmp_path / "out" / "runs" / "beagle-early" / "seed0").is_dir()


def test_validation_is_of_every_length(made, tmp_path):
    store = StateStore.existing(made / "data")
    target = tiny_target()
    held = sorted(len(s.tokens) for s in samples(store.shards(), validation=False))

    def lengths(count):
        config = TrainConfig(**TRAIN, validation_samples=count)
        with pytest.MonkeyPatch.context() as patched:  # few answers: take those of training
            patched.setattr(trainer, "samples", lambda shards, validation: samples(shards, validation=False))
            groups = trainer.Trainer(target, store, tmp_path / str(count), config).validation
        return [len(s.tokens) for group in groups for s in group]

    assert lengths(100) == held
    few = lengths(4)
    assert 1 < len(few) <= 4
    assert few[0] == held[0]
    assert few[-1] > held[len(held) // 2]


def test_growth_of_memory_below_a_megabyte_is_none():
    assert growth([0.0, 0.4]) == 1
    assert growth([2.0, 3.0, 5.0]) == 2.5


def test_when_a_length_is_reached():
    curve = [{"seconds": 10, "expected_length": 1.5}, {"seconds": 20, "expected_length": 2.5}]
    entry = Entry("a", [{"curve": curve}])
    assert reached(entry, 1.25, "seconds") == 5
    assert reached(entry, 2.0, "seconds") == 15
    assert reached(entry, 2.6, "seconds") is None
    assert expected_length([0.5, 0.5]) == 1.75


def test_seeds_are_averaged():
    records = [{"variant": "a", "seed": s, "expected_length": 1.0 + s, "step_alpha": [0.2 * s]} for s in (0, 1)]
    found = entries(records, {"plain": {}, "dynamic": {"a/seed0": {"tau": 1.0}, "a/seed1": {"tau": 2.0}}})["a"]
    assert (found.length, found.step_alpha, found.acceptance) == (1.5, [0.1], 1.5)


def test_a_variant_whose_process_is_killed():
    import os

    with pytest.raises(BeagleError, match="killed"):
        run_variants.in_fresh_process(os._exit, 9)


WORK = """
import os, sys, time
from pathlib import Path

from beagle.research.compare.run_variants import in_fresh_process

def work(folder):
    try:
        (folder / "begun").write_text(str(os.getpid()))
        time.sleep(600)
    except KeyboardInterrupt:
        (folder / "saved").touch()
        raise

if __name__ == "__main__":
    in_fresh_process(work, Path(sys.argv[1]))
"""


@pytest.mark.slow
def test_what_ends_the_command_ends_its_training(tmp_path):
    """A signal to the command alone: the process that trains must not go on writing into the run."""
    (tmp_path / "work.py").write_text(WORK)
    arguments = [sys.executable, tmp_path / "work.py", tmp_path]
    start = partial(signal.signal, signal.SIGINT, signal.SIG_IGN)  # as what a shell starts in the background has it
    with subprocess.Popen(arguments, stderr=subprocess.PIPE, preexec_fn=start) as command:
        until = time.monotonic() + 240
        while not (tmp_path / "begun").is_file() and time.monotonic() < until:
            time.sleep(0.05)
        command.terminate()
        assert b"KeyboardInterrupt" in command.communicate(timeout=240)[1]
    assert (tmp_path / "saved").is_file()
    with pytest.raises(ProcessLookupError):
        os.kill(int((tmp_path / "begun").read_text()), 0)
