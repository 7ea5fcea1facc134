"""The side-by-side run: its figures, its JSON, and what stops it."""

from __future__ import annotations

import json

import pytest

import test_cli
from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.evaluation import bench as b
from beagle.evaluation.stock import Stock
from beagle.model import Model
from beagle.training.prompts import Prompt
from conftest import tiny_drafter, tiny_model, tiny_target

folders, beagle = test_cli.folders, test_cli.beagle
MODES = ["plain", "beagle", "transformers"]
QUESTIONS = [
    {"id": "a", "prompt": "w3 w4 w5"},
    {"id": "b", "turns": ["w9", "w8"]},
    {"id": "c", "prompt": "w30 w7"},
    {"id": "d", "prompt": "w12"},
]


@pytest.fixture
def questions(tmp_path):
    path = tmp_path / "mixed.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))
    return path


@pytest.fixture
def bench(folders, beagle, questions, tmp_path):
    """Runs the command; returns its outcome and its JSON."""

    def call(*extra):
        path = tmp_path / "figures" / "out.json"
        ended = beagle("bench", "--questions", questions, *folders.options, "-n", 8, "--json", path, *extra)
        return ended, json.loads(path.read_text()) if path.exists() else None

    return call


def test_json_of_a_whole_run(bench, folders, questions):
    ended, result = bench("--seed", 5)
    assert ended.code == 0
    assert list(result["modes"]) == MODES
    for figures in result["modes"].values():
        assert {
            "tokens", "seconds", "prefill_seconds", "tokens_per_second", "tau", "step_alpha", "identical",
            "peak_memory_mb",
        } <= set(figures)  # fmt: skip
        assert figures["questions"] == 4
        assert 4 <= figures["tokens"] <= 32
        assert figures["identical"] == 1.0
        assert figures["tokens"] == result["modes"]["plain"]["tokens"]
        assert all(figures[name] > 0 for name in ("seconds", "prefill_seconds", "tokens_per_second", "peak_memory_mb"))
    assert result["modes"]["plain"]["tau"] == 1
    assert result["modes"]["transformers"]["tau"] == 1
    assert result["modes"]["beagle"]["tau"] >= 1
    assert all(0 <= alpha <= 1 for alpha in result["modes"]["beagle"]["step_alpha"])
    assert list(result["ratios"]) == ["beagle/plain", "plain/transformers", "beagle/transformers"]
    for ratio in result["ratios"].values():
        assert 0 < ratio["low"] <= ratio["median"] <= ratio["high"]
    assert result["first_differences"] == {mode: {"mixed": []} for mode in ("beagle", "transformers")}
    meta = result["meta"]
    assert {"date", "machine", "versions", "revision", "command"} <= set(meta)
    assert meta["arguments"]["seed"] == 5
    assert meta["arguments"]["questions"] == [questions.name]
    assert meta["arguments"]["max_new_tokens"] == 8
    assert meta["target"] == {"name": str(folders.target), "dtype": "float32"}
    assert (meta["finished_questions"], meta["interrupted"]) == (4, False)
    assert "mixed (4 questions)" in ended.out
    assert "beagle/plain" in ended.out


def test_limit_and_some_modes(bench):
    ended, result = bench("--limit", 2, "--modes", "plain, beagle", "--exact")
    assert ended.code == 0
    assert list(result["modes"]) == ["plain", "beagle"]
    assert list(result["ratios"]) == ["beagle/plain"]
    assert result["modes"]["beagle"]["questions"] == 2
    assert result["modes"]["beagle"]["identical"] == 1.0
    _, result = bench("--limit", 1, "--modes", "transformers")
    assert result["ratios"] == {}
    assert result["modes"]["transformers"]["identical"] is None


def test_several_sets(bench, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text('{"prompt": "w40 w41"}\n')
    ended, result = bench("--questions", second, "--modes", "beagle,plain")
    assert ended.code == 0
    assert {name: part["modes"]["plain"]["questions"] for name, part in result["sets"].items()} == {
        "mixed": 4,
        "second": 1,
    }
    tokens = [part["modes"]["beagle"]["tokens"] for part in result["sets"].values()]
    assert result["modes"]["beagle"]["tokens"] == sum(tokens)
    assert result["meta"]["arguments"]["questions"] == ["mixed.jsonl", "second.jsonl"]


def test_sampling_with_drafts_is_identical(bench):
    _, result = bench("--temperature", 1.2, "--modes", "plain,beagle", "--seed", 3)
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert "first_differences" not in result


def interrupt(monkeypatch, at):
    """Ctrl-C in the second mode of question ``at``."""
    answer = b.answer

    def interrupted(model, mode, prompt, options, rivals=None):
        if prompt.id == at and mode == "beagle":
            raise KeyboardInterrupt
        return answer(model, mode, prompt, options, rivals)

    monkeypatch.setattr(b, "answer", interrupted)


def test_interrupted_run_keeps_finished_questions(bench, monkeypatch, tmp_path):
    interrupt(monkeypatch, "c")
    later = tmp_path / "later.jsonl"
    later.write_text('{"prompt": "w40 w41"}\n')
    ended, result = bench("--questions", later)
    assert ended.code == 0
    assert {figures["questions"] for figures in result["modes"].values()} == {2}
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert list(result["sets"]) == ["mixed"]
    assert (result["meta"]["finished_questions"], result["meta"]["interrupted"]) == (2, True)


def test_interrupted_before_the_first_answer(bench, monkeypatch):
    interrupt(monkeypatch, "a")
    ended, result = bench()
    assert ended.code == 130
    assert result is None
    assert "Traceback" not in ended.err


def test_unwritable_json(folders, beagle, questions, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out.json", tmp_path):
        ended = beagle("bench", "--questions", questions, *folders.options, "--json", path)
        ended.refusal(f"cannot write '{path}'")
        assert "questions" not in ended.err  # found out before the work
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    beagle("bench", "--questions", questions, "--json", kept, "--modes", "no").refusal("mode 'no'", "plain")
    assert kept.read_text() == "old"


def test_bad_lines(bench, questions):
    questions.write_text('{"prompt": "w3"}\n{"prompt": \n{"prompt": "w5"}\n')
    ended, result = bench()
    ended.refusal(f"{questions}:2: ", "--skip-bad-lines")
    assert result is None
    ended, result = bench("--skip-bad-lines", "--modes", "plain")
    assert ended.code == 0
    assert f"{questions.name}:2: " in "".join(ended.err.splitlines())
    assert result["modes"]["plain"]["questions"] == 2


def test_missing_questions_and_heads(folders, beagle, questions, tmp_path):
    missing = tmp_path / "missing.jsonl"
    beagle("bench", "--questions", missing, *folders.options).refusal(missing)
    beagle("bench", "--questions", questions, *folders.plain).refusal(folders.target, "--draft", "--modes")
    ended = beagle("bench", "--questions", questions, *folders.plain, "--modes", "plain", "-n", 2)
    assert ended.code == 0


def stats(tokens, seconds):
    return Stats(tokens=tokens + 1, passes=tokens, passed_tokens=tokens, decode_seconds=seconds)


def test_ratios_are_by_question_and_pooled():
    slow = b.ModeRun([stats(10, 1.0) for _ in range(11)])
    fast = b.ModeRun([stats(10, 1 / (1 + i)) for i in range(11)])
    ratio = b.ratio(fast, slow)
    assert (ratio["low"], ratio["median"], ratio["high"]) == (2, 6, 10)
    seconds = sum(1 / (1 + i) for i in range(11))
    assert ratio["pooled"] == pytest.approx(11 / seconds, abs=1e-3)
    assert b.ratio(b.ModeRun([stats(0, 0.0)]), b.ModeRun([stats(0, 0.0)])) == {}


def test_identical_is_by_whole_answers():
    plain = b.ModeRun([stats(2, 1.0)] * 2, [[3, 4], [5, 6]])
    other = b.ModeRun([stats(2, 1.0)] * 2, [[3, 4], [5]])
    assert b.summary({"plain": plain, "beagle": other})["modes"]["beagle"]["identical"] == 0.5
    assert b.merge({"x": {"plain": plain}, "y": {"plain": other}})["plain"].answers == [[3, 4], [5, 6], [3, 4], [5]]


@pytest.fixture(scope="module")
def model():
    target = tiny_target()
    return Model(target, tiny_drafter(target))


def test_modes_take_turns(model, monkeypatch):
    order = []
    answer = b.answer
    monkeypatch.setattr(b, "answer", lambda m, mode, p, *o: order.append((p.id, mode)) or answer(m, mode, p, *o))
    prompts = [Prompt(name, ("w3 w4",)) for name in "abc"]
    notes = []
    b.run(model, {"set": prompts}, MODES, b.Options(2), notes.append, b.Rivals(stock=Stock(tiny_model())))
    assert notes == ["set"] * 3
    assert [mode for name, mode in order if name in "abc"] == [MODES[(i + j) % 3] for i in range(3) for j in range(3)]


def test_the_librarys_mode_runs_the_stock_model(model, monkeypatch):
    prompt = Prompt("a", ("w3 w4",))
    monkeypatch.setattr(type(model.target), "_forward", lambda *a: 1 / 0)
    ids, stats = b.answer(model, "transformers", prompt, b.Options(8), b.Rivals(stock=Stock(tiny_model())))
    assert len(ids) == stats.tokens
    with pytest.raises(ZeroDivisionError):
        b.answer(model, "plain", prompt, b.Options(8))


def test_first_difference_is_found_with_its_gap(model):
    prompt = Prompt("a", ("w3 w4",))
    plain, _ = b.answer(model, "plain", prompt, b.Options(8))
    changed = [*plain[:3], (plain[3] + 1) % 64, *plain[4:]]
    runs = {"plain": b.ModeRun([], [plain]), "beagle": b.ModeRun([], [changed]), "cut": b.ModeRun([], [plain[:5]])}
    (found,) = b.first_differences(model, [prompt], runs, "beagle")
    assert (found["id"], found["position"]) == ("a", 3)
    assert found["gap"] > 0
    assert b.first_differences(model, [prompt], runs, "plain") == []
    assert b.first_differences(model, [prompt], runs, "cut") == [{"id": "a", "position": 5, "gap": None}]


def test_unknown_mode_and_missing_head():
    bare = Model(tiny_target())
    with pytest.raises(BeagleError, match="mode 'fast'"):
        b.run(bare, {}, ["fast"], b.Options())
    with pytest.raises(BeagleError, match="--modes"):
        b.run(bare, {}, ["beagle"], b.Options())
