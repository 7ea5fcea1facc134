"""Question sets: suites, files of all kinds, the hub, and what is said about missing ones."""

from __future__ import annotations

import json
import sys
from types import SimpleNamespace

import pytest

from beagle.errors import BeagleError
from beagle.evaluation import suites
from beagle.training.prompts import Prompt, read_prompts


def write(path, *rows):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture
def data(tmp_path, monkeypatch):
    """Two questions in every file that the suites read, six categories in Spec-Bench's."""
    for file in suites.SUITES["paper"]:
        write(tmp_path / "eval" / file, *({"id": f"{file}-{n}", "category": "c", "turns": ["q"]} for n in range(2)))
    kinds = ["writing", "writing", "math", "translation", "qa", "qa", "qa"]
    write(
        tmp_path / "eval" / "spec_bench.jsonl",
        *({"question_id": n, "category": c, "turns": ["q"]} for n, c in enumerate(kinds)),
    )
    monkeypatch.setenv("BEAGLE_DATA", str(tmp_path))
    return tmp_path


def test_suites(data):
    assert {name: len(p) for name, p in suites.load_suite("paper").items()} == dict.fromkeys(
        ("mt_bench", "gsm8k_200", "cnn_dm", "humaneval"), 2
    )
    parts = suites.load_suite("spec-bench")
    assert {name: [p.id for p in few] for name, few in parts.items()} == {
        "mt_bench": ["0", "1", "2"],
        "translation": ["3"],
        "qa": ["4", "5", "6"],
    }
    few = suites.load_suite("spec-bench", 2)
    assert [p.category for p in few["mt_bench"]] == ["writing", "math"]
    assert len(few["qa"]) == 2


def test_quick_needs_no_file(monkeypatch):
    monkeypatch.delenv("BEAGLE_DATA", raising=False)
    (prompts,) = suites.load_suite("quick").values()
    assert 12 <= len(prompts) <= 16
    assert sum(len(p.turns) == 2 for p in prompts) == 2
    assert len({p.id for p in prompts}) == len(prompts)


def test_missing_suites_name_the_remedy(data, monkeypatch):
    (data / "eval" / "cnn_dm.jsonl").unlink()
    with pytest.raises(BeagleError, match=r"lacks cnn_dm\.jsonl; set BEAGLE_DATA"):
        suites.load_suite("paper")
    monkeypatch.delenv("BEAGLE_DATA")
    with pytest.raises(BeagleError, match=r"set BEAGLE_DATA.*suite 'quick'"):
        suites.load_suite("spec-bench")
    with pytest.raises(BeagleError, match="suite 'long' is unknown; use paper"):
        suites.load_suite("long")


def test_a_limit_takes_categories_in_turn():
    prompts = [Prompt(str(n), ("q",), c) for n, c in enumerate("aaabbc")]
    assert [p.id for p in suites.limit_by_category(prompts, 4)] == ["0", "1", "3", "5"]
    assert suites.limit_by_category(prompts, None) == suites.limit_by_category(prompts, 9) == prompts


def test_files(tmp_path):
    share = {"id": "x", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}
    first = write(tmp_path / "one.jsonl", {"prompt": "p"}, share, share, {"question": "why"})
    second = write(tmp_path / "two.jsonl", {"question_id": 81, "turns": ["a", "b"]})
    sets = suites.load_questions([str(first), str(second)])
    assert [(p.id, p.turns) for p in sets["one"]] == [("1", ("p",)), ("x", ("a",)), ("x (2)", ("a",)), ("4", ("why",))]
    assert sets["two"][0].turns == ("a", "b")
    with pytest.raises(BeagleError, match="two question files are named 'one'"):
        suites.load_questions([str(first), str(first)])
    with pytest.raises(BeagleError, match="can't be read"):
        suites.load_questions([str(tmp_path / "none.jsonl")])


def test_hub_data_sets(monkeypatch):
    monkeypatch.setitem(sys.modules, "datasets", None)
    with pytest.raises(BeagleError, match=r"'owner/name' is no file.*pip install 'beagle-decoding\[data]'"):
        suites.load_questions(["owner/name"])
    asked = []

    def load(*names, split):
        asked.append((*names, split))
        return [{"prompt": ["a", "b"], "category": "c"}] if names[0] == "owner/chat" else [{"text": "?"}]

    monkeypatch.setitem(sys.modules, "datasets", SimpleNamespace(load_dataset=load))
    sets = suites.load_questions(["owner/chat/main:train"])
    assert sets["chat"] == [Prompt("1", ("a", "b"), "c")]
    with pytest.raises(BeagleError, match="data set 'owner/text' can't be used"):
        suites.load_questions(["owner/text"])
    assert asked == [("owner/chat", "main", "train"), ("owner/text", "test")]


def test_the_packaged_questions_are_read_by_the_common_reader():
    assert all(p.category for p in read_prompts(suites.QUICK))
