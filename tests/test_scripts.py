"""The benchmarks: large shapes, and other engines side by side."""

from __future__ import annotations

import argparse
import importlib
import json
import runpy
import sys
from pathlib import Path

import pytest
import torch

from beagle.drafters.checkpoint import load_head, weight_files
from beagle.evaluation.modes import Options, System
from beagle.evaluation.roofline import Machine
from beagle.model import Model
from beagle.targets.loading import load_target
from beagle.training.answer_files import AnswerFolder, AnswersManifest, StoredAnswer
from conftest import tiny_target

SCRIPTS = Path(__file__).parent.parent / "benchmarks"
ENGINE = """
import json, sys
print(json.dumps({"about": "echo 1"}), flush=True)
for line in sys.stdin:
    asked = json.loads(line)
    if len(asked["ids"]) > 9:
        sys.exit("too long a prompt")
    print(json.dumps({"ids": asked["ids"][: asked["limit"]], "passes": 2, "prefill": 0.25, "decode": 0.5}), flush=True)
"""


@pytest.fixture(autouse=True)
def scripts(monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS))


def test_drafts_are_right_as_often_as_asked(tmp_path, monkeypatch):
    shapes = importlib.import_module("gpu_shapes")
    monkeypatch.setattr(shapes.roofline, "measure", lambda target: (Machine(1e9, 1e10), {}))  # it takes a while
    words = "--shape tiny --tokens 48 --size 2 --size 12 --chance 1 --chance 0 --chance 0.5 --depth 3 --device cpu"
    shapes.main([*words.split(), "--dtype", "float32", "--json", str(tmp_path / "out.json")])
    rows = json.loads((tmp_path / "out.json").read_text())["shapes"]["tiny"]["rows"]
    tau = {(row["chance"], row["candidates"]): row["tau"] for row in rows}
    assert tau[None, 0] == tau[0.0, 2] == tau[0.0, 12] == 1.0
    assert tau[1.0, 2] == pytest.approx(3.0, abs=0.2)  # the root's token and two levels
    assert tau[1.0, 12] == pytest.approx(4.0, abs=0.2)
    assert 1.3 < tau[0.5, 12] < 2.5  # expected: 1 + 1/2 + 1/4 + 1/8


@pytest.fixture
def beside():
    target = tiny_target()
    return System("plain", Model(target))


def test_an_engine_in_its_own_process(beside, tmp_path):
    process = importlib.import_module("baselines.process")
    (tmp_path / "engine.py").write_text(ENGINE)
    engine = process.start("echo", [sys.executable, tmp_path / "engine.py"], {}, beside)
    ids, stats = engine.answer([5, 6, 7, 8], Options(max_new_tokens=3), 0)
    assert (engine.about, ids) == ("echo 1", [5, 6, 7])
    assert (stats.tokens, stats.tau, stats.tokens_per_second, stats.prefill_seconds) == (3, 1.0, 4.0, 0.25)
    with pytest.raises(process.BeagleError, match="echo has ended: too long a prompt"):
        engine.answer(list(range(3, 20)), Options(), 0)
    engine.close()


def test_engines_that_are_not_there(beside, tmp_path):
    process = importlib.import_module("baselines.process")
    with pytest.raises(process.Missing, match="no-such-engine"):
        process.start("x", [tmp_path / "no-such-engine"], {}, beside)
    with pytest.raises(process.Missing, match="did not start: no luck"):
        process.start("x", [sys.executable, "-c", "import sys; sys.exit('no luck')"], {}, beside)
    with pytest.raises(process.Missing, match="did not start: Error: no file"):
        process.start("x", [sys.executable, "-c", "import sys; sys.exit('Error: no file\\nversion 20')"], {}, beside)


@pytest.mark.parametrize("kind", ["BF16", "Q8_0"])
def test_gguf_of_another_type(tmp_path, kind):
    from gguf import GGMLQuantizationType, GGUFReader, GGUFWriter, LlamaFileType
    from gguf.quants import dequantize, quantize

    write = importlib.import_module("baselines.write_gguf")
    weights = torch.randn(4, 64, generator=torch.Generator().manual_seed(0)).numpy()
    writer = GGUFWriter(tmp_path / "in.gguf", "llama")
    writer.add_file_type(LlamaFileType.MOSTLY_Q4_1)
    writer.add_token_list(["a", "b"])
    writer.add_rope_freq_base(10000.0)
    q4 = GGMLQuantizationType.Q4_1
    writer.add_tensor("matrix", quantize(weights, q4), raw_dtype=q4)
    writer.add_tensor("norm", weights[0])
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    assert write.with_type(tmp_path / "in.gguf", "Q4_1") == tmp_path / "in.gguf"
    out = write.with_type(tmp_path / "in.gguf", kind)
    assert write.file_type(out) == kind
    read = GGUFReader(out)
    assert read.fields["tokenizer.ggml.tokens"].contents() == ["a", "b"]
    assert read.fields["llama.rope.freq_base"].contents() == 10000.0
    tensors = {tensor.name: tensor for tensor in read.tensors}
    assert tensors["norm"].data.tolist() == weights[0].tolist()
    held = torch.tensor(dequantize(quantize(weights, q4), q4)).bfloat16().float()
    found = torch.tensor(dequantize(tensors["matrix"].data, tensors["matrix"].tensor_type))
    assert torch.equal(found, held) if kind == "BF16" else (found - held).abs().max() < 0.02


def test_table_and_plot_show_losses_and_what_is_missing(tmp_path):
    pytest.importorskip("matplotlib")
    tables = importlib.import_module("baselines.tables")
    mode = {"questions": 4, "passes": 9, "tau": 1.0, "prefill_seconds": 1.0, "identical": 0.5}
    spread = {"median": 1.0, "count": 4}
    result = {
        "modes": {
            "transformers": {**mode, "tokens_per_second": 10.0},
            "plain": {**mode, "tokens_per_second": 20.0},
            "vllm": {**mode, "tokens_per_second": 5.0},
        },
        "over_transformers": {
            "transformers": {**spread, "low": 1.0, "high": 1.0, "pooled": 1.0},
            "plain": {**spread, "low": 1.8, "high": 2.2, "pooled": 2.0},
            "vllm": {**spread, "low": 0.4, "high": 0.6, "pooled": 0.5},
        },
        "labels": {"transformers": "transformers: generate", "plain": "Beagle: plain", "vllm": "vLLM: plain"},
        "not_measured": {"llama.cpp: BF16": "no --gguf FILE"},
        "meta": {
            "target": {"name": "tiny"}, "settings": {"max_new_tokens": 8}, "engines": {"vllm": "vLLM 1"},
            "machine": {"cpu": "some", "threads": 2}, "command": "python benchmarks/side_by_side.py",
        },
    }  # fmt: skip
    text = tables.markdown(result)
    assert "| Beagle: plain | 20.0 | 2.00× (1.80 to 2.20) |" in text
    assert "| vLLM: plain | 5.0 | 0.50× (0.40 to 0.60) |" in text
    assert "| llama.cpp: BF16 | not measured | no --gguf FILE |" in text
    tables.plot(result, tmp_path / "out.png")
    assert (tmp_path / "out.png").read_bytes().startswith(b"\x89PNG")


def test_side_by_side_loads_the_target_with_what_the_heads_read(monkeypatch):
    monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")  # which the script would set
    monkeypatch.setenv("GOMP_SPINCOUNT", "100000")
    side_by_side = importlib.import_module("side_by_side")
    asked = []
    monkeypatch.setattr(side_by_side, "load_target", lambda name, **options: asked.append(options["state_layers"]))
    monkeypatch.setattr(side_by_side, "load_systems", lambda target, modes, *a, **o: [System(m, None) for m in modes])
    given = argparse.Namespace(target="smollm2-135m", dtype="bfloat16", draft="auto", eagle=None)
    for names, layers in ((("plain",), ()), (("plain", "head"), (10, 20)), (("beagle",), (10, 20))):
        engines = [engine for engine in side_by_side.ENGINES if engine.name in names]
        side_by_side.ours(engines, given, {})
        assert asked.pop() == layers


def test_hybrids_drafted_and_plain_take_turns(tmp_path, monkeypatch):
    speed = importlib.import_module("hybrid_speed")
    monkeypatch.setattr(speed, "HIDDEN", 32)
    monkeypatch.setattr(speed, "VOCABULARY", 300)
    small = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    small |= {"num_key_value_heads": 1, "head_dim": 16, "vocab_size": 300}
    monkeypatch.setattr(speed, "SMOLLM2", speed.SMOLLM2 | small)
    layers = {"layer_types": [speed.LINEAR, speed.FULL], "linear_num_key_heads": 2, "linear_num_value_heads": 2}
    monkeypatch.setitem(speed.FAMILIES, "qwen3_5_text", layers | {"linear_key_head_dim": 8, "linear_value_head_dim": 8})
    path = tmp_path / "out.json"
    words = "--family qwen3_5_text --chance 1 --depth 3 --tokens 12 --repeats 2 --dtype float32 --json"
    speed.main([*words.split(), str(path)])
    found = json.loads(path.read_text())["families"]["qwen3_5_text"]
    assert {mode: len(speeds) for mode, speeds in found["tokens_per_second"].items()} == {"plain": 2, "drafted": 2}
    assert found["tau"] == pytest.approx([4.0, 4.0], abs=0.4)  # the root's token and three drafted ones
    assert found["speed_up"] > 0


def test_a_head_is_made_smaller(folders, tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(str(SCRIPTS.parent / "tools"))
    shrink = importlib.import_module("shrink_head")
    target = load_target(str(folders.target), dtype="float32", device="cpu")
    answers = AnswerFolder.create(tmp_path / "answers", AnswersManifest.of(target, {}))
    often = [9, 9, 9, 5, 5, 30]
    answers.append([StoredAnswer("0" * 16, "a", 0, 0.0, False, 3, torch.tensor(often))])
    whole = load_head(folders.head, target)
    words = [
        "--target",
        str(folders.target),
        "--vocabulary",
        "3",
        "--answers",
        str(answers.folder),
        "--int8",
        "--most-mb",
        "0.004",
    ]
    shrink.main([str(folders.head), *words, "--out", str(tmp_path / "small")])
    small = load_head(tmp_path / "small", target)
    kept = small.draft_vocab.tolist()
    ends = sorted(target.eos_ids)
    assert kept == sorted([*ends, *[token for token in (9, 5, 30) if token not in ends][: 3 - len(ends)]])
    parts = weight_files(tmp_path / "small")
    assert len(parts) > 1
    assert {path.suffix for path in (tmp_path / "small").iterdir()} == {".json", ".safetensors"}
    for name, weight in whole.state_dict().items():
        if name != "draft_vocab":
            assert torch.allclose(small.state_dict()[name], weight, atol=0.01), name
    content = json.loads((tmp_path / "small" / "config.json").read_text())
    assert "shrink_head.py" in content["meta"]["shrunk"]


def test_a_script_ends_with_one_line(tmp_path, monkeypatch, capsys):
    script = SCRIPTS.parent / "tools" / "shrink_head.py"
    monkeypatch.setattr(sys, "argv", [str(script), str(tmp_path), "--target", "tiny", "--out", str(tmp_path / "out")])
    with pytest.raises(SystemExit) as ended:
        runpy.run_path(str(script), run_name="__main__")
    line = f"error: draft '{tmp_path}': no config.json there; give a folder that `beagle train` wrote\n"
    assert (ended.value.code, capsys.readouterr().err) == (2, line)
