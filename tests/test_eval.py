"""The suite run: every mode and turn, raw answers, resuming, determinism."""

from __future__ import annotations

import json

import pytest

from beagle.decoding.costs import Costs
from beagle.decoding.stats import Stats
from beagle.errors import BeagleError
from beagle.evaluation import figures, run
from beagle.evaluation.modes import Options, System
from beagle.evaluation.records import Record, Turn, read_records, read_result, write_result
from beagle.model import Model
from beagle.targets.chat import encode
from beagle.training.prompts import Prompt
from conftest import interrupt, tiny_drafter, tiny_target

QUESTIONS = [
    {"question_id": 1, "category": "x", "turns": ["w3 w4 w5", "w6"]},
    {"question_id": 2, "category": "y", "turns": ["w9 w8"]},
    {"question_id": 3, "category": "x", "turns": ["w30 w7"]},
]
MODES = ["plain", "beagle", "lookup"]


@pytest.fixture
def evaluate(folders, beagle, tmp_path, monkeypatch):
    """Runs the command on three questions; returns its outcome and its JSON."""
    monkeypatch.setattr("beagle.model.cached_costs", lambda *a: Costs([0.01] * 65, 0.005, 5))  # measuring takes a while
    path = tmp_path / "three.jsonl"
    path.write_text("".join(json.dumps(q) + "\n" for q in QUESTIONS))

    def call(*extra, out="out.json", modes="plain,beagle,lookup"):
        arguments = ["--questions", path, *folders.options, "-n", 12, "--modes", modes, "--json", tmp_path / out]
        ended = beagle("eval", *arguments, *extra)
        return ended, json.loads((tmp_path / out).read_text()) if (tmp_path / out).exists() else None

    return call


def steady(result):
    """What a second run must reproduce exactly."""
    modes = {
        mode: {name: m[name] for name in ("tau", "step_alpha", "identical", "near_ties", "tokens", "passes")}
        for mode, m in result["modes"].items()
    }
    answers = [
        (r["id"], r["mode"], [t["ids"] for t in r["turns"]], [t["accepted"] for t in r["turns"]])
        for r in result["records"]
    ]
    return modes, answers


def test_a_whole_run_and_its_second(evaluate):
    ended, result = evaluate("--repeats", 2)
    assert ended.code == 0
    assert list(result["modes"]) == MODES
    assert [(r["id"], r["mode"], r["repeat"]) for r in result["records"]][:4] == [
        ("1", "plain", 0), ("1", "beagle", 0), ("1", "lookup", 0), ("1", "plain", 1),
    ]  # fmt: skip
    for mode, m in result["modes"].items():
        assert (m["questions"], m["identical"], m["near_ties"]) == (3, 1.0, 0.0)
        assert m["memory_above_target_mb"] >= 0
        total = m["draft_seconds"] + m["verify_seconds"] + m["accept_seconds"] + m["other_seconds"]
        assert total == pytest.approx(m["seconds"], abs=1e-3)
        assert min(m["verify_seconds"], m["accept_seconds"]) > 0
        assert m["other_seconds"] >= 0
        if mode != "plain":  # constant costs: a pass 10 ms, a draft 5
            assert m["expected_speed_up"] == pytest.approx(m["tau"] / 1.5, abs=1e-3)
    assert list(result["sets"]["three"]["categories"]) == ["x", "y"]
    assert result["sets"]["three"]["categories"]["x"]["modes"]["plain"]["questions"] == 2
    assert [len(r["turns"]) for r in result["records"][::6]] == [2, 1, 1]
    for row in result["records"]:
        for turn in row["turns"]:
            assert sum(n + 1 for n in turn["accepted"]) == turn["passed_tokens"] == len(turn["ids"]) - 1
            assert len(turn["pieces"]) == (0 if row["repeat"] else len(turn["ids"]))
    assert result["ratios"]["beagle/plain"]["count"] == 6
    assert "expected" in ended.out
    assert steady(evaluate("--repeats", 2, out="again.json")[1]) == steady(result)


def test_sampling_pairs_seeds_over_modes_and_varies_them_over_repeats(evaluate):
    _, result = evaluate("--temperature", 1.0, "--repeats", 2, "--seed", 4, modes="plain,beagle")
    assert result["modes"]["beagle"]["identical"] == 1.0
    assert "first_differences" not in result
    first, second = ([t["ids"] for r in result["records"] if r["repeat"] == n for t in r["turns"]] for n in range(2))
    assert first != second


def test_an_interrupted_run_is_kept_and_resumed(evaluate, monkeypatch):
    _, whole = evaluate(out="whole.json")
    go_on = interrupt(monkeypatch, "3")
    ended, part = evaluate("--resume")  # nothing there yet: it starts
    assert ended.code == 130
    assert "--resume" in ended.err
    assert (part["meta"]["finished_questions"], part["meta"]["interrupted"]) == (2, True)
    go_on()
    evaluate()[0].refusal("out.json", "--resume")
    evaluate("--resume", "--seed", 9)[0].refusal("out.json", "seed 0, not 9")
    asked = []
    ask = run.ask
    monkeypatch.setattr(run, "ask", lambda c, name, p, *a: asked.append(p.id) or ask(c, name, p, *a))
    ended, result = evaluate("--resume")
    assert ended.code == 0
    assert set(asked) == {"warm-up", "3"}
    assert steady(result) == steady(whole)
    assert not result["meta"]["interrupted"]
    asked.clear()
    assert evaluate("--resume")[0].code == 0
    assert not asked  # all there: not even a warm-up


def test_refusals(folders, beagle, tmp_path, monkeypatch):
    monkeypatch.delenv("BEAGLE_DATA", raising=False)
    beagle("eval").refusal("--suite", "--questions")
    beagle("eval", "--suite", "paper").refusal("suite 'paper'", "BEAGLE_DATA")
    beagle("eval", "--suite", "long").refusal("suite 'long'", "quick")
    beagle("eval", "--questions", tmp_path / "none.jsonl").refusal("none.jsonl", "check the path")
    beagle("eval", "--suite", "quick", "--resume").refusal("--resume", "--json")
    (tmp_path / "other.json").write_text("{}")
    beagle("eval", "--suite", "quick", "--resume", "--json", tmp_path / "other.json").refusal("other.json", "eval")


def test_every_available_mode_runs_unless_named(evaluate, folders):
    _, result = evaluate("--limit", 1, "--small-model", folders.target, modes="")
    assert list(result["modes"]) == ["plain", "beagle", "lookup", "small", "transformers", "prompt-lookup", "assisted"]


@pytest.fixture(scope="module")
def model():
    target = tiny_target()
    return Model(target, tiny_drafter(target))


def test_the_second_turn_holds_the_models_own_first_answer(model, monkeypatch):
    heard = []
    answer = System.answer

    def noted(self, prompt, *rest):
        heard.append(prompt)
        return answer(self, prompt, *rest)

    monkeypatch.setattr(System, "answer", noted)
    system = System("plain", Model(model.target))
    record = run.ask(system, "set", Prompt("a", ("w3 w4", "w5")), Options(6), 0)
    said = model.target.tokenizer.decode(record.turns[0].ids, skip_special_tokens=True)
    roles = [(m["role"], m["content"]) for m in heard[1]]
    assert roles == [("user", "w3 w4"), ("assistant", said), ("user", "w5")]
    ids = model.generate(heard[1], max_new_tokens=6, draft=False).token_ids
    assert record.turns[1].ids == ids


def test_a_difference_is_looked_for_in_the_turn_where_it_is(model):
    prompt = Prompt("a", ("w3 w4", "w5"))
    plain = run.ask(System("plain", Model(model.target)), "set", prompt, Options(6), 0)
    wrong = [*plain.turns[1].ids[:2], (plain.turns[1].ids[2] + 1) % 64]
    other = Record("set", "a", "", "beagle", 0, [plain.turns[0], Turn(wrong, Stats())])
    same, found = run.compared(model.target, prompt, [plain, other])
    assert same.difference is None
    assert (found.difference["turn"], found.difference["position"]) == (1, 2)
    context = encode(model.target, run.next_question(model.target, prompt, plain.turns[:1]))
    assert found.difference["gap"] > 0
    assert len(context) > len(encode(model.target, "w5"))


def test_turns_without_a_template_are_refused_before_the_work(model, monkeypatch):
    monkeypatch.setattr(model.target.tokenizer, "chat_template", None)
    systems = [System("plain", Model(model.target))]
    with pytest.raises(BeagleError, match=r"'a' of set.*chat template"):
        next(run.run(systems, {"set": [Prompt("a", ("w3", "w4"))]}, Options(2)))
    (part,) = run.run(systems, {"set": [Prompt("a", ("w3",))]}, Options(2))
    assert len(part) == 1


@pytest.mark.parametrize(
    ("values", "text"),
    [
        ({"pooled": 1.2, "low": 1.1, "high": 1.3, "count": 5}, "1.20× (1.10 to 1.30)"),
        ({"pooled": 0.8, "low": 0.7, "high": 0.9, "count": 5}, "0.80× (0.70 to 0.90)"),
        ({"pooled": 1.05, "low": 0.97, "high": 1.1, "count": 5}, "not resolved: 0.97 to 1.10"),
        ({"pooled": 0.99, "low": 1.01, "high": 1.1, "count": 5}, "not resolved: 1.01 to 1.10"),
        ({"pooled": 1.2, "low": 1.2, "high": 1.2, "count": 1}, "not resolved: one measurement, 1.20"),
        ({}, "-"),
    ],
)
def test_no_plain_number_where_the_spread_is_wider_than_the_effect(values, text):
    assert figures.speed_up_text(values) == text


def test_expected_speed_up_is_the_cost_models():
    costs = Costs([0.0, 0.01, 0.012, 0.02], 0.005, 5)
    assert figures.expected(2.0, 1.2, costs) == pytest.approx(2 * 0.01 / (0.005 + 0.02 - 0.008))
    assert figures.expected(2.0, 60, costs) == pytest.approx(2 * 0.01 / 0.025)  # no larger pass was measured


def test_records_survive_their_file(tmp_path):
    stats = Stats(tokens=4, passed_tokens=3, decode_seconds=0.5)
    stats.note_pass(1)
    stats.note_pass(0)
    turn = Turn([5, 6, 7, 8], stats, ["a", "b", "", "c"])
    record = Record("set", "a", "c", "beagle", 0, [turn], 10.0, 2.0, {"turn": 0, "position": 1, "gap": 0.25})
    result = {"modes": {}, "ratios": {}, "meta": {}}
    write_result(tmp_path / "r.json", result, [record, record])
    content = read_result(tmp_path / "r.json")
    assert read_records(tmp_path / "r.json", content) == [record, record]
    assert turn.origins() == [0, 1, 0, 0]
    (tmp_path / "r.json").write_text('{"modes": {}, "ratios": {}, "meta": {}, "records": [{"set": "a"}]}')
    with pytest.raises(BeagleError, match=r"r\.json.*turns"):
        read_records(tmp_path / "r.json", read_result(tmp_path / "r.json"))


def test_a_question_beyond_the_context_ends_the_run_with_its_name(evaluate, tmp_path):
    later = tmp_path / "later.jsonl"
    later.write_text('{"id": "huge", "prompt": "' + "w4 " * 600 + '"}\n')
    ended, result = evaluate("--questions", later, modes="plain")
    ended.refusal("question 'huge' of later", "512", "shorten")
    assert "three (3 questions)" in ended.out
    assert result["meta"]["interrupted"]


def test_a_run_that_calls_top_k_beam_goes_on(evaluate, tmp_path):
    """Earlier versions called the tree's breadth so."""
    _, result = evaluate(modes="plain")
    result["meta"]["arguments"]["beam"] = result["meta"]["arguments"].pop("top_k")
    (tmp_path / "out.json").write_text(json.dumps(result))
    assert evaluate("--resume", modes="plain")[0].code == 0
    result["meta"]["arguments"]["beam"] = 3
    (tmp_path / "out.json").write_text(json.dumps(result))
    evaluate("--resume", modes="plain")[0].refusal("top_k 3, not 8")
