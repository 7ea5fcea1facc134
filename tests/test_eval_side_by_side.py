"""The side-by-side run: its figures, its JSON, and what stops it."""

from __future__ import annotations

import errno

import pytest

from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.evaluation import figures, run
from beagle.evaluation.first_divergence import first_divergence, is_near_tie
from beagle.evaluation.hf_generate import HFGenerate
from beagle.evaluation.modes import Drafts, Options, System, load_systems
from beagle.evaluation.records import Record, Turn
from beagle.model import Model
from beagle.targets.chat import encode
from beagle.training.prompts import Prompt
from conftest import interrupt, tiny_model, tiny_target

MODES = ["plain", "beagle", "transformers"]


def test_json_of_a_whole_run(first_turns, folders, questions):
    ended, result = first_turns("--seed", 5)
    assert ended.code == 0
    assert list(result["modes"]) == MODES
    for found in result["modes"].values():
        assert {
            "tokens", "seconds", "prefill_seconds", "tokens_per_second", "tau", "step_alpha", "identical",
            "peak_memory_mb",
        } <= set(found)  # fmt: skip
        assert found["questions"] == 4
        assert 4 <= found["tokens"] <= 32
        assert found["identical"] == 1.0
        assert found["tokens"] == result["modes"]["plain"]["tokens"]
        assert all(found[name] > 0 for name in ("seconds", "prefill_seconds", "tokens_per_second", "peak_memory_mb"))
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
    assert meta["target"] == {"name": folders.target.name, "dtype": "float32"}  # no path of this machine
    assert (meta["finished_questions"], meta["interrupted"]) == (4, False)
    assert "mixed (4 questions)" in ended.out
    assert "beagle/plain" in ended.out


def test_first_turns_alone(first_turns):
    _, result = first_turns("--modes", "plain")
    assert [len(record["turns"]) for record in result["records"]] == [1, 1, 1, 1]  # question b has two
    assert result["meta"]["arguments"]["first_turns"] is True


def test_limit_and_some_modes(first_turns):
    ended, result = first_turns("--limit", 2, "--modes", "plain, beagle", "--exact")
    assert ended.code == 0
    assert list(result["modes"]) == ["plain", "beagle"]
    assert list(result["ratios"]) == ["beagle/plain"]
    assert result["modes"]["beagle"]["questions"] == 2
    assert result["modes"]["beagle"]["identical"] == 1.0
    _, result = first_turns("--limit", 1, "--modes", "transformers")
    assert result["ratios"] == {}
    assert result["modes"]["transformers"]["identical"] is None


def test_several_sets(first_turns, tmp_path):
    second = tmp_path / "second.jsonl"
    second.write_text('{"prompt": "w40 w41"}\n')
    ended, result = first_turns("--questions", second, "--modes", "beagle,plain")
    assert ended.code == 0
    assert {name: part["modes"]["plain"]["questions"] for name, part in result["sets"].items()} == {
        "mixed": 4,
        "second": 1,
    }
    tokens = [part["modes"]["beagle"]["tokens"] for part in result["sets"].values()]
    assert result["modes"]["beagle"]["tokens"] == sum(tokens)
    assert result["meta"]["arguments"]["questions"] == ["mixed.jsonl", "second.jsonl"]


def test_sampling_with_drafts_is_identical(first_turns):
    _, result = first_turns("--temperature", 1.2, "--modes", "plain,beagle", "--seed", 3)
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert "first_differences" not in result


def test_interrupted_run_keeps_finished_questions(first_turns, monkeypatch, tmp_path):
    interrupt(monkeypatch, "c")
    later = tmp_path / "later.jsonl"
    later.write_text('{"prompt": "w40 w41"}\n')
    ended, result = first_turns("--questions", later)
    assert ended.code == 130
    assert "mixed (2 questions)" in ended.out
    assert {figures["questions"] for figures in result["modes"].values()} == {2}
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert list(result["sets"]) == ["mixed"]
    assert (result["meta"]["finished_questions"], result["meta"]["interrupted"]) == (2, True)


def test_a_question_beyond_the_context_is_named_and_the_finished_ones_are_kept(first_turns, tmp_path):
    later = tmp_path / "later.jsonl"
    later.write_text('{"id": "huge", "prompt": "' + "w4 " * 600 + '"}\n')
    ended, result = first_turns("--questions", later, "--modes", "plain")
    ended.refusal("question 'huge' of later", "512", "shorten")
    assert "mixed (4 questions)" in ended.out
    assert (result["meta"]["finished_questions"], result["meta"]["interrupted"]) == (4, True)


def test_figures_are_shown_where_they_cannot_be_stored(first_turns, monkeypatch):
    def full(*arguments):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr("beagle.files.os.replace", full)
    ended, result = first_turns("--modes", "plain")
    ended.refusal("out.json", "No space left on device", "free space")
    assert "mixed (1 questions)" in ended.out  # no more is answered than could be stored
    assert result is None


def test_interrupted_before_the_first_answer(first_turns, monkeypatch):
    interrupt(monkeypatch, "a")
    ended, result = first_turns()
    assert ended.code == 130
    assert result is None
    assert "Traceback" not in ended.err


def test_unwritable_json(folders, beagle, questions, tmp_path):
    (tmp_path / "file").write_text("")
    for path in (tmp_path / "file" / "out.json", tmp_path):
        ended = beagle("eval", "--questions", questions, *folders.options, "--json", path)
        ended.refusal(f"cannot write '{path}'")
        assert "questions" not in ended.err  # found out before the work
    kept = tmp_path / "kept.json"
    kept.write_text("old")
    beagle("eval", "--questions", questions, "--json", kept, "--modes", "no").refusal("mode 'no'", "plain")
    assert kept.read_text() == "old"


def test_bad_lines(first_turns, questions):
    questions.write_text('{"prompt": "w3"}\n{"prompt": \n{"prompt": "w5"}\n')
    ended, result = first_turns()
    ended.refusal(f"{questions}:2: no JSON from column 11", "--skip-bad-lines")
    assert result is None
    ended, result = first_turns("--skip-bad-lines", "--modes", "plain")
    assert ended.code == 0
    assert f"{questions.name}:2: " in "".join(ended.err.splitlines())
    assert result["modes"]["plain"]["questions"] == 2


def test_missing_questions_and_heads(folders, beagle, questions, tmp_path):
    missing = tmp_path / "missing.jsonl"
    beagle("eval", "--questions", missing, *folders.options).refusal(missing)
    beagle("eval", "--questions", questions, *folders.plain, "--modes", "plain,beagle").refusal(
        folders.target, "pass a folder as draft", "modes"
    )
    ended = beagle("eval", "--questions", questions, *folders.plain, "--modes", "plain", "-n", 2)
    assert ended.code == 0


def record(mode, identity, ids, seconds=1.0, repeat=0):
    """An answer of so many tokens after the first, in so many seconds."""
    stats = Stats(tokens=len(ids), passed_tokens=len(ids) - 1, decode_seconds=seconds)
    for _ in ids[1:]:
        stats.note_pass(0)
    return Record("set", identity, "", mode, repeat, [Turn(ids, stats)])


def test_ratios_are_by_question_and_pooled():
    ids = [5] * 11
    slow = [record("plain", str(i), ids) for i in range(11)]
    fast = [record("beagle", str(i), ids, 1 / (1 + i)) for i in range(11)]
    ratio = figures.ratio(fast, slow)
    assert (ratio["low"], ratio["median"], ratio["high"], ratio["count"]) == (2, 6, 10, 11)
    seconds = sum(1 / (1 + i) for i in range(11))
    assert ratio["pooled"] == pytest.approx(11 / seconds, abs=1e-3)
    assert figures.ratio([record("beagle", "0", [5], 0.0)], [record("plain", "0", [5], 0.0)]) == {}


def test_speed_takes_each_question_at_its_median_over_the_repeats():
    ids = [5] * 11
    records = [record("plain", "a", ids, seconds, n) for n, seconds in enumerate((1.0, 2.0, 50.0))]
    assert figures.speed(records) == pytest.approx(5.0)
    records += [record("plain", "b", ids, 1.0, n) for n in range(3)]
    assert figures.speed(records) == pytest.approx(60 / 9)


def test_identical_is_by_whole_answers():
    plain = [record("plain", "a", [3, 4]), record("plain", "b", [5, 6])]
    other = [record("beagle", "a", [3, 4]), record("beagle", "b", [5])]
    assert figures.summary(plain + other)["modes"]["beagle"]["identical"] == 0.5
    assert figures.summary(other)["modes"]["beagle"]["identical"] is None


@pytest.fixture(scope="module")
def three(model):
    return [
        System("plain", Model(model.target)),
        System("beagle", model),
        System("transformers", model, HFGenerate(tiny_model())),
    ]


def test_modes_take_turns(three, monkeypatch):
    order = []
    ask = run.ask

    def noted(system, name, prompt, options, repeat):
        order.append((prompt.id, repeat, system.mode))
        return ask(system, name, prompt, options, repeat)

    monkeypatch.setattr(run, "ask", noted)
    prompts = [Prompt(name, ("w3 w4",)) for name in "abc"]
    parts = list(run.run(three, {"set": prompts}, Options(2), repeats=2))
    assert [[(r.repeat, r.mode) for r in part] for part in parts] == [[(n, m) for n in range(2) for m in MODES]] * 3
    asked = [mode for name, _, mode in order if name in "abc"]
    assert asked == [MODES[(i + n + j) % 3] for i in range(3) for n in range(2) for j in range(3)]


def test_the_librarys_mode_runs_the_stock_model(three, model, monkeypatch):
    monkeypatch.setattr(type(model.target), "run", lambda *a: 1 / 0)
    ids, stats = three[2].answer("w3 w4", Options(8), 0)
    assert len(ids) == stats.tokens
    with pytest.raises(ZeroDivisionError):
        three[0].answer("w3 w4", Options(8), 0)


def test_first_difference_is_found_with_its_gap(three, model):
    plain, _ = three[0].answer("w3 w4", Options(8), 0)
    changed = [*plain[:3], (plain[3] + 1) % 64, *plain[4:]]
    context = encode(model.target, "w3 w4")
    found = first_divergence(model.target, context, changed, plain)
    assert found["position"] == 3
    assert found["gap"] > 0
    assert first_divergence(model.target, context, plain, plain) is None
    assert first_divergence(model.target, context, plain[:5], plain) == {"position": 5, "gap": None}
    gaps = {0.0: True, -0.25: True, 0.5: True, 0.51: False, None: False}
    assert {gap: is_near_tie({"gap": gap}) for gap in gaps} == gaps
    assert not is_near_tie(None)


def test_unknown_mode_and_missing_head():
    target = tiny_target()
    with pytest.raises(BeagleError, match="mode 'fast'"):
        load_systems(target, ["fast"], Drafts())
    with pytest.raises(BeagleError, match="twice"):
        load_systems(target, ["plain", "plain"], Drafts())
    with pytest.raises(BeagleError, match="out of modes"):
        load_systems(target, ["beagle"], Drafts())


def test_quantised_targets_are_lossless_and_named(first_turns):
    ended, result = first_turns("--quantize", "int8", "--exact", "--modes", "plain,beagle")
    assert ended.code == 0
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert result["meta"]["target"]["quantize"] == "int8"
    assert result["meta"]["arguments"]["quantize"] == "int8"
