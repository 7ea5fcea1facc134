"""The sweep over all families: what it says of one that is served, one that is refused, one that differs; and its table."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import pytest

from beagle.targets import attention
from beagle.targets.head_transform import NAME
from beagle.targets.plan import Chunk

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


MECHANISMS = {  # a family, and what its tiny model must have lest the test tries nothing
    "sliding windows": ("cohere2", lambda target: 8 in target.layers.windows),
    "RoPE by the length": ("phi3@longrope", lambda target: target.context_ends),
    "sinks": ("gpt_oss", lambda target: any(target.layers.sinks)),
    "chunks": ("llama4_text", lambda target: Chunk(8) in target.layers.windows),
    "attention of their own": ("bloom", lambda target: target.layers.own),
    "recurrent states": ("qwen3_5_text", lambda target: target.chains_only),
    "short convolutions": ("lfm2", lambda target: 0 in target.layers.heads),
    "latent attention": ("deepseek_v3", lambda target: target.config.kv_lora_rank),
    "indices": ("glm_moe_dsa", lambda target: target.layers.indices),
    "positions that generate gives": ("roberta", lambda target: target.config.pad_token_id == 0),
    "LM heads with a transform": ("bert", lambda target: hasattr(target.base, NAME)),
    "text parts": ("gemma3", lambda target: target.config is not target.model.config),
}


@pytest.mark.parametrize("mechanism", MECHANISMS)
def test_one_family_of_each_mechanism(sweep, monkeypatch, mechanism):
    """All that the sweep asks of a family, of a few in the time of a test."""
    name, has = MECHANISMS[mechanism]
    targets = []
    load = sweep.load_target
    monkeypatch.setattr(
        sweep, "load_target", lambda *given, **named: targets.append(load(*given, **named)) or targets[0]
    )
    monkeypatch.setattr(sweep, "NEW", 8)
    found = sweep.family(name)
    assert found["outcome"] == "identical", found.get("why")
    assert found["trains"] == "yes"
    assert has(targets[0])
    refused = [way for way, of in found["ways"].items() if of != "identical"]
    assert refused == (["exact"] if targets[0].chains_only else [])
