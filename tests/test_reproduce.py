"""``beagle research reproduce``: every item end to end at a miniature scale, kept results, and what stops it."""

from __future__ import annotations

import csv
import json
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest

from beagle.decoding.costs import Costs
from beagle.drafters.base import TreePlan
from beagle.evaluation import suites
from beagle.research.compare import run_variants, train_variant
from beagle.research.compare.variants import parse
from beagle.research.reproduce import tables
from beagle.research.reproduce.data import find_material
from beagle.research.reproduce.experiments import ITEMS, find_items
from beagle.research.reproduce.scales import SCALES, Scale
from beagle.training.config import TrainConfig
from beagle.training.recipe import AnswerConfig, Recipe, read_recipe
from beagle.training.states import StateStore
from conftest import tiny_model, tiny_tokenizer

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
MINIATURE = Scale(
    about="as small as it gets",
    recipe=Recipe(
        AnswerConfig(rows=8, max_prompt_tokens=90, max_new_tokens=16, max_turns=1),
        TrainConfig(
            early_epochs=1, late_epochs=1, batch_tokens=240, learning_rate=1e-2, warmup_steps=2, schedule="cosine",
            regression=0.1, draft_vocab_size=100, validate_every=2, checkpoint_every=9, validation_samples=4,
        ),
        {"newest_state": "scale"},
    ),
    prompts=40,
    tokens=700,
    memory_tokens=100,
    questions=2,
    max_new_tokens=6,
    tree=TreePlan("dynamic", 3, 3, 4),
)  # fmt: skip


@pytest.fixture(scope="module")
def target(tmp_path_factory):
    folder = tmp_path_factory.mktemp("made") / "target"
    tiny_model().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def here(monkeypatch):
    """Work is done in this process; what was trained, and what else was done, is listed."""
    done = []

    def run(work, *arguments):
        done.append(arguments[0].out.parent.name if work is train_variant.train_variant else work.__name__)
        return work(*arguments)

    monkeypatch.setattr(run_variants, "in_fresh_process", run)
    monkeypatch.setattr("beagle.model.cached_costs", lambda *a: Costs([0.01] * 65, 0.005, 5))  # measuring takes a while
    monkeypatch.setitem(SCALES, "tiny", MINIATURE)
    monkeypatch.delenv("BEAGLE_DATA", raising=False)
    return done


@pytest.fixture
def reproduce(beagle, here, target, tmp_path):
    def call(*extra, out="out"):
        return beagle("research", "reproduce", *extra, "--target", target, "--device", "cpu", "--out", tmp_path / out)

    return call


def test_all_of_it_and_a_second_time(reproduce, here, tmp_path):
    ended = reproduce("all")
    assert ended.code == 0, ended.err
    out = tmp_path / "out"
    counts = Counter(here)
    heads = [name for name in counts if name.startswith(("beagle", "eagle"))]
    assert {name: counts[name] for name in heads} == dict.fromkeys(heads, 1), "a head is trained once"
    assert {"beagle", "eagle", "beagle-early", "beagle-early-k1", "beagle-s1", "beagle-early-moe"} <= set(heads)
    assert (counts["answer"], counts["measure"], counts["decode"]) == (1, 1, 3)
    index = (out / "index.md").read_text()
    for name, item in ITEMS.items():
        findings = json.loads((out / name / "findings.json").read_text())
        assert findings, name
        for finding in findings:
            verdict = "agrees" if finding["agrees"] else "differs"
            assert f"| {finding['claim']} | {finding['paper']} | {finding['found']} | {verdict} |" in index
            assert f"{finding['claim']}: {finding['found']} (paper: {finding['paper']}): {verdict}" in ended.err
        agree = sum(finding["agrees"] for finding in findings)
        assert f"| {name} | {item.title} | {agree} of {len(findings)} |" in index
        plots = {path.stem for path in (out / name).glob("*.svg")}
        assert plots
        assert {path.stem for path in (out / name).glob("*.png")} == plots
        assert all(f"({name}/{plot}.png)" in index for plot in plots)
        assert {"speed", "times"} <= plots or not (item.decodes and item.suite)
        if item.suite:
            assert {"compare.json", "compare.csv", "curves.csv"} <= {path.name for path in (out / name).iterdir()}
            assert "courses" in plots or item.suite.short
    assert "Vicuna 7B" in index
    assert "familiar questions" in index  # the package's own were trained on
    result = json.loads((out / "table1" / "eval.json").read_text())
    assert list(result["modes"]) == tables.MODES
    rows = list(csv.DictReader((out / "table1" / "table.csv").open()))
    assert [(row["set"], row["mode"]) for row in rows] == [("quick", mode) for mode in tables.MODES]
    assert all(m["identical"] == 1 for mode, m in result["modes"].items() if mode in ("beagle", "eagle", "lookup"))

    before = here.copy()
    ended = reproduce("all")
    assert ended.code == 0, ended.err
    assert here == before
    assert all(f"{name}: kept" in ended.err for name in ITEMS)

    assert reproduce("fig12", "--again").code == 0
    assert here[len(before) :] == ["beagle", "beagle-window", "beagle-noreg", "beagle-window-noreg"]


def test_interrupted_it_goes_on_where_it_stopped(reproduce, here, tmp_path, monkeypatch):
    ordinary = train_variant.Measured._one

    def interrupted(self, group):
        if self.config.batch_tokens > 240 and self.step == 1:
            raise KeyboardInterrupt
        return ordinary(self, group)

    with monkeypatch.context() as patched:
        patched.setattr(train_variant.Measured, "_one", interrupted)
        ended = reproduce("fig3", "fig6")
    assert ended.code == 130
    assert "run the same command again" in ended.err
    assert "fig6 |" not in (tmp_path / "out" / "index.md").read_text()
    assert here == ["answer", "beagle-early", "eagle", "beagle-early-b4", "beagle-early-b32"]
    first = (tmp_path / "out" / "fig3" / "findings.json").stat().st_mtime_ns
    seen = []
    with monkeypatch.context() as patched:
        patched.setattr(train_variant.Measured, "_one", lambda self, g: seen.append(self.step) or ordinary(self, g))
        assert reproduce("fig3", "fig6").code == 0
    assert here[5:] == ["beagle-early-b32"]
    assert seen[0] == 1
    assert (tmp_path / "out" / "fig3" / "findings.json").stat().st_mtime_ns == first


def test_interrupted_tables_keep_their_questions(reproduce, here, monkeypatch, tmp_path):
    from beagle.evaluation import run as side_by_side

    ask, asked = side_by_side.ask, []

    def counting(system, name, prompt, *rest):
        asked.append(prompt.id)
        if len(set(asked)) > 2 and stop:  # the warm-up and one question are through
            raise KeyboardInterrupt
        return ask(system, name, prompt, *rest)

    monkeypatch.setattr(side_by_side, "ask", counting)
    stop = True
    assert reproduce("table2").code == 130
    stored = json.loads((tmp_path / "out" / "table1" / "eval.json").read_text())
    assert (stored["meta"]["finished_questions"], stored["meta"]["interrupted"]) == (1, True)
    stop = False
    asked.clear()
    assert reproduce("table1").code == 0
    assert stored["questions"][0]["id"] not in asked
    result = json.loads((tmp_path / "out" / "table1" / "eval.json").read_text())
    assert (result["meta"]["finished_questions"], result["meta"]["interrupted"]) == (2, False)
    assert result["records"][: len(tables.MODES)] == stored["records"]


def test_answers_that_are_there_are_used_and_left_alone(reproduce, here, tmp_path):
    assert reproduce("fig6", out="first").code == 0
    data = tmp_path / "first" / "data"
    before = {path: path.stat().st_mtime_ns for path in data.iterdir()}
    assert reproduce("fig3", "--data", data).code == 0
    assert here[-2:] == ["beagle-early", "eagle"]
    assert {path: path.stat().st_mtime_ns for path in data.iterdir()} == before
    assert not (tmp_path / "out" / "data").exists()


def test_plan_says_what_it_takes_and_runs_nothing(reproduce, here, tmp_path):
    for scale in SCALES:
        ended = reproduce("all", "--scale", scale, "--plan")
        assert ended.code == 0, ended.err
        assert "trains 19 heads" in ended.err
        assert ("A6000" in ended.err, "20 epochs" in ended.err) == (scale == "full",) * 2
    assert here == []
    assert not (tmp_path / "out").exists()


def test_bad_input_is_one_line(reproduce, here, tmp_path, monkeypatch):
    reproduce("fig99").refusal("fig99", "table1", "fig12", "memory")
    reproduce("fig8").refusal("fig8", "fig10")
    reproduce("all", "--scale", "huge").refusal("huge", "tiny, small, full")
    reproduce("fig3", "--data", tmp_path / "nowhere").refusal(tmp_path / "nowhere", "beagle train")
    reproduce("fig3", "--data", tmp_path, "--prompts", tmp_path / "p.jsonl").refusal("--prompts")
    reproduce("fig3", "--prompts", tmp_path / "p.jsonl").refusal(tmp_path / "p.jsonl")
    monkeypatch.setenv("BEAGLE_DATA", str(tmp_path))
    reproduce("fig3").refusal("mt_bench.jsonl", "BEAGLE_DATA")
    monkeypatch.delenv("BEAGLE_DATA")
    assert here == []
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "w3 " * 200}) + "\n")
    reproduce("fig3", "--prompts", long, out="long").refusal("90 tokens", "shorter")
    (tmp_path / "out").rename(tmp_path / "aside")
    assert reproduce("fig6").code == 0
    monkeypatch.setitem(SCALES, "tiny", replace(MINIATURE, tokens=800))
    reproduce("fig6").refusal("budgets", "another folder")
    monkeypatch.setitem(SCALES, "tiny", MINIATURE)
    (tmp_path / "out" / "fig6" / "findings.json").write_text("[")
    reproduce("fig6").refusal("findings.json", "damaged")


def test_decoded_questions_are_not_trained_on(monkeypatch):
    monkeypatch.delenv("BEAGLE_DATA", raising=False)
    material = find_material(None, False, None, None)
    trained = {prompt.turns[0] for prompt in material.prompts}
    decoded = {prompt.turns[0] for prompts in material.sets.values() for prompt in prompts}
    own = {prompt.turns[0] for prompt in suites.load_suite("quick")["quick"]}
    assert not trained & decoded
    assert trained | decoded == own
    assert len({prompt.id for prompt in material.prompts}) == len(material.prompts)


def test_prompts_and_sets_of_a_data_folder(monkeypatch, tmp_path):
    (tmp_path / "eval").mkdir()
    for file in suites.SUITES["paper"]:
        (tmp_path / "eval" / file).write_text('{"prompt": "w3"}\n{"prompt": "w4"}\n')
    own = tmp_path / "own.jsonl"
    own.write_text("".join(f'{{"prompt": "w{i}"}}\n' for i in range(9)))
    monkeypatch.setenv("BEAGLE_DATA", str(tmp_path))
    material = find_material(own, False, 5, 1)
    assert {name: len(prompts) for name, prompts in material.sets.items()} == {
        "mt_bench": 1,
        "gsm8k_200": 1,
        "cnn_dm": 1,
    }
    assert len(material.prompts) == 5
    assert (material.note, material.sampled) == ("", False)
    assert find_material(own, False, 5, 1).prompts == material.prompts  # drawn, but the same ones each time


def test_full_scale_is_the_papers_recipe():
    assert SCALES["full"].recipe == read_recipe(ROOT / "configs" / "paper.yaml")
    assert {scale.recipe.train.window for scale in SCALES.values()} == {5}
    assert {scale.recipe.train.steps for scale in SCALES.values()} == {4}


def test_one_training_has_one_folder():
    recipe = MINIATURE.recipe
    same = [("beagle-early-k5", "beagle-early"), ("beagle-k5-s4", "beagle"), ("beagle-early-b16", "beagle-early")]
    for long, short in same:
        assert parse(long).plain_name(recipe) == short
        assert parse(long).settings(recipe, 0) == parse(short).settings(recipe, 0)
    for name in ("eagle-u4", "beagle-early-k4", "beagle-s3", "beagle-b8"):
        assert parse(name).plain_name(recipe) == name
    assert parse("beagle-k5-s3").plain_name(recipe) == "beagle-s3"
    assert parse("beagle-b32").settings(recipe, 0)[0].batch_tokens == 480


def test_items_stand_in_the_papers_order_and_once():
    assert [item.name for item in find_items(["fig4", "table2", "table1", "fig4"])] == ["table1", "fig4"]
    assert [item.name for item in find_items(["all"])] == list(ITEMS)


def test_given_answers_of_another_target(reproduce, here, tmp_path):
    assert reproduce("fig6", out="first").code == 0
    manifest = tmp_path / "first" / "data" / "manifest.json"
    manifest.write_text(json.dumps({**json.loads(manifest.read_text()), "template": "another"}))
    assert StateStore.existing(manifest.parent).fingerprint.template == "another"
    reproduce("fig3", "--data", manifest.parent).refusal("template 'another'")
