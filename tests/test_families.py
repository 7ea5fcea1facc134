"""The sweep over all families: what it says of one that is served, one that is refused, one that differs; and its table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from beagle.targets import attention

TOOLS = Path(__file__).parent.parent / "tools"


@pytest.fixture
def sweep(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    return importlib.import_module("family_sweep")


def test_families_and_the_file_of_them(sweep, tmp_path, capsys):
    path = tmp_path / "out.json"
    sweep.sweep(["llama", "falcon@alibi"], path)
    sweep.sweep(["cpmant", "no-such-family"], path)
    result = json.loads(path.read_text())
    outcomes = {found["family"]: found["outcome"] for found in result["families"]}
    assert outcomes == {
        "llama": "identical", "falcon@alibi": "identical", "cpmant": "refused", "no-such-family": "unbuilt",
    }  # fmt: skip
    (llama,) = (found for found in result["families"] if found["family"] == "llama")
    assert set(llama["ways"].values()) == {"identical"}
    assert llama["trains"] == "yes"
    assert result["meta"]["seed"] == 0
    assert result["meta"]["versions"]["transformers"]
    assert len([line for line in capsys.readouterr().out.splitlines() if line.startswith("llama ")]) == 1


def test_a_difference_is_seen(sweep, monkeypatch, tmp_path):
    sweep.build("llama", tmp_path)
    own, gaps = sweep.own_answers(tmp_path)
    real = attention.attend_trees

    def wrong(plan, query, key, value, scaling, *rest):
        return real(plan, query, key, value, 3 * scaling, *rest)

    monkeypatch.setattr(attention, "attend_trees", wrong)  # which the comparison at load doesn't try
    found = sweep.judged(tmp_path, own, gaps)
    assert found["outcome"] == "differs"
    assert found["why"].startswith("batch: differs")


def test_the_table(monkeypatch):
    monkeypatch.syspath_prepend(str(TOOLS))
    table = importlib.import_module("family_table")
    served = {"outcome": "identical", "ways": {"plain": "identical", "exact": "refused: no"}, "trains": "yes"}
    refused = "its layers (mamba) keep a recurrent state; choose a model"
    text = table.families([{
        "families": [
            {"family": "a", **served}, {"family": "b", "outcome": "refused", "why": refused},
            {"family": "c", "outcome": "refused", "why": refused.replace("mamba", "rwkv")}, {"family": "a@x", **served},
        ],
        "meta": {"versions": {"transformers": "5.0", "torch": "2.0"}, "revision": "abc", "date": "2026-01-02T03"},
    }])  # fmt: skip
    assert "| 1 | identical, but for exact | a |" in text
    assert "| 2 | refused: its layers keep a recurrent state | b, c |" in text
    assert "1 of the 3 families of transformers 5.0 are served. So are 1 of 1 variants" in text
