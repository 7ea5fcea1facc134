"""More prompts out of a collection: questions behind passages, and other system messages."""

from __future__ import annotations

import gzip
import importlib
import json
from pathlib import Path

import pytest

from beagle.errors import BeagleError
from beagle.training.prompts import read_prompts

WHALES = " ".join(["Whales sing songs that other whales hear across an ocean."] * 7)
BREAD = " ".join(["Bread rises because yeast makes gas in warm dough overnight."] * 7)
ROWS = [
    {"id": "a", "category": "qa", "turns": ["Why do whales sing?"]},
    {"id": "b", "category": "summarization", "turns": [f"Sum up.\n\n{WHALES}\n\n{BREAD}"]},
    {"id": "c", "category": "rag", "turns": [f"Answer.\n\n[1] {BREAD}\n\nQuestion: Why does bread rise?"]},
    {"id": "d", "category": "chat", "turns": ["Hello", "Goodbye"]},
]


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(Path(__file__).parents[1] / "tools"))
    return importlib.import_module("more_prompts")


def made(tool, tmp_path, name):
    source = tmp_path / "prompts.jsonl"
    source.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    tool.main([str(source), "--passages", "6", "--systems", "4", "--out", str(tmp_path / name)])
    return gzip.decompress((tmp_path / name).read_bytes())


def test_questions_stand_with_passages_that_share_their_words(tool, tmp_path, monkeypatch):
    monkeypatch.setattr(tool, "COMMON", 1.0)  # of so few passages each word is in many
    assert made(tool, tmp_path, "one.gz") == made(tool, tmp_path, "two.gz")
    prompts = read_prompts(tmp_path / "one.gz")
    passages, systems = prompts[:6], prompts[6:]
    assert [("whales" in p.turns[0], "Why does bread rise?" in p.turns[0]) for p in passages] == [
        (True, False),
        (False, True),
    ] * 3
    assert all("Whales sing songs" in p.turns[0] for p in passages[::2])
    assert all("yeast makes gas" in p.turns[0] for p in passages[1::2])
    assert sorted(p.turns[0] for p in systems) == sorted(row["turns"][0] for row in ROWS[:3])
    assert all(p.system in tool.SYSTEMS for p in systems)
    assert made(tool, tmp_path, "one.gz").count(b"\n") == 9


def test_a_collection_without_questions(tool, tmp_path):
    source = tmp_path / "chat.jsonl"
    source.write_text(json.dumps(ROWS[3]) + "\n")
    with pytest.raises(BeagleError, match=r"^no prompt asks a question.*--passages 0"):
        tool.main([str(source), "--out", str(tmp_path / "out.gz")])
    assert not (tmp_path / "out.gz").exists()
