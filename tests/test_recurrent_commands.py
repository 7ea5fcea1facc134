"""Commands with a target that keeps a recurrent state: what there is not for it is left out with a line, nothing fails."""

from __future__ import annotations

import json

import pytest
import torch

from beagle.decoding.costs import Costs
from beagle.drafters.checkpoint import save_head
from beagle.serving import server
from beagle.targets.target import Target
from conftest import Folders, tiny_head, tiny_model, tiny_tokenizer

DELTA = {
    "layer_types": ["linear_attention", "full_attention"], "num_hidden_layers": 2, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8,
}  # fmt: skip
LEFT_OUT = "answers do without exact mode: it keeps a recurrent state"


@pytest.fixture(scope="module")
def hybrid(tmp_path_factory) -> Folders:
    """A saved tiny hybrid, and a draft head for it."""
    root = tmp_path_factory.mktemp("hybrid")
    tiny_model("qwen3_5_text", **DELTA).save_pretrained(root / "target")
    tiny_tokenizer().save_pretrained(root / "target")
    target = Target(tiny_model("qwen3_5_text", **DELTA), tiny_tokenizer(), "hybrid")
    save_head(tiny_head(target, scale=15.0), root / "head", target="hybrid", dtype=torch.float32, meta={})
    return Folders(root / "target", root / "head")


@pytest.fixture(autouse=True)
def measured(monkeypatch):
    monkeypatch.setattr("beagle.model.cached_costs", lambda *_: Costs([0.01] * 65, 0.005, 5))  # measuring takes a while


def test_generate(hybrid, beagle):
    plain = beagle("generate", "w3 w4 w5", *hybrid.plain, "-n", 8)
    assert plain.code == 0
    for extra in ((), ("--exact",), ("--tree", "static"), ("--tree", "chain", "--exact"), ("--draft", "lookup")):
        found = beagle("generate", "w3 w4 w5", *hybrid.options, "-n", 8, *extra)
        assert (found.code, found.out) == (0, plain.out), extra
        assert (LEFT_OUT in found.err) == ("--exact" in extra)
        assert "so drafts are chains" in " ".join(found.err.split())


def test_eval(hybrid, beagle, questions, tmp_path):
    """The default modes, two of which transformers has not for such models; a second run goes on with the first."""
    path = tmp_path / "out.json"
    words = ["eval", "--questions", questions, *hybrid.options, "-n", 4, "--exact", "--json", path]
    found = beagle(*words)
    assert found.code == 0, found.err
    assert LEFT_OUT in found.err
    assert "transformers can't draft for a target with a recurrent state, so prompt-lookup is left out" in found.err
    result = json.loads(path.read_text())
    assert list(result["modes"]) == ["plain", "beagle", "lookup", "transformers"]
    assert result["meta"]["arguments"]["exact"] is False
    assert all(figures["identical"] == 1 for mode, figures in result["modes"].items() if mode != "plain")
    assert beagle(*words, "--resume").code == 0


def test_serve(hybrid, beagle, monkeypatch):
    engines = []
    monkeypatch.setattr(server, "run", lambda app, engine, listener: engines.append(engine))
    found = beagle("serve", *hybrid.options, "--port", 0, "--exact")
    assert found.code == 0, found.err
    assert LEFT_OUT in found.err
    assert [engine.exact for engine in engines] == [False]
    for engine in engines:
        engine.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_demo(hybrid, beagle, dtype):
    """In half precision it asks for exact mode by itself, and near-ties may fall otherwise without."""
    found = beagle("demo", *hybrid.options[:4], "--dtype", dtype, "--device", "cpu", "-n", 4)
    assert found.code == 0, found.err
    assert (LEFT_OUT in found.err) == (dtype == "bfloat16")
